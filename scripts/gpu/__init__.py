"""What only a GPU can show; :mod:`scripts.gpu.__main__` runs the parts, one file each."""
