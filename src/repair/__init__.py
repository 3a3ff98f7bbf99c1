"""The verb ``patch``: repair a cut model without training, in weights that it already has."""
