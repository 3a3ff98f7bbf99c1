"""What the scripts share, and the comparison of two commits."""
