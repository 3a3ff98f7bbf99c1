"""Text that a model writes itself: rows to recover a shortened model on, in the parent's own words."""
