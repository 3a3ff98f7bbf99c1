"""One story per script, each run as ``python -m scripts.<name>``."""
