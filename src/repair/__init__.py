"""The patch verb: repairs of a cut without training, folded into the weights."""
