"""Units are what a mask removes from a decoder; spaces say in which combinations."""
