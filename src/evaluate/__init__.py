"""The evaluate verb: divergence, exact match and public tasks beside the teacher."""
