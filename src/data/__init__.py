"""Corpora as LightningDataModules: reading, rendering, tokenising, packing, and exact resume."""

from src.data.batches import real_tokens, row_ids
from src.data.columns import Columns
from src.data.corpus import Corpus
from src.data.soft import PromptedCorpus
from src.data.sources import Source

__all__ = ["Columns", "Corpus", "PromptedCorpus", "Source", "real_tokens", "row_ids"]
