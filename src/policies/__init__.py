"""Mask policies: one file each, named by class path in YAML."""

from src.policies.base import MaskPolicy, Probe
from src.policies.gumbel_topk import GumbelTopK

__all__ = ["GumbelTopK", "MaskPolicy", "Probe"]
