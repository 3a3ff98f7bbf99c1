"""Distil soft prompts, a few rows of embeddings from which a tiny repair learns as from many real rows."""

from src.prompts.stage import DistilledCalibration

__all__ = ["DistilledCalibration"]
