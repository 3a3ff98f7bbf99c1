"""Prune and merge the tokens of a vision transformer, where Prune and Merge is at home (arXiv 2503.23455)."""
