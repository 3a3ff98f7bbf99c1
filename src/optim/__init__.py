"""Optimisers of this product; a config may name any of torch's in their place."""

from src.optim.adam_s import AdamS
from src.optim.shared_adam import SharedAdam

__all__ = ["AdamS", "SharedAdam"]
