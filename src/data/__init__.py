"""Corpora as LightningDataModules."""

from src.data.corpus import Corpus

__all__ = ["Corpus"]
