"""Repair a cut model without training, by changing weights that it already has; the verb is ``patch``."""
