"""The ``evaluate`` verb: judges models beside their teacher by divergence, exact match and public tasks."""
