"""The grow verb: larger models from one recovery, without training."""
