"""One story per script, each run as ``python -m scripts.<name>``; :mod:`scripts.lab` is what they share."""
