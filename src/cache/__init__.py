"""The teacher's top-k distributions on disk: written once by ``predict``, read by every recovery."""

from src.cache.corpus import CachedCorpus
from src.cache.manifest import Manifest
from src.cache.reader import Cache
from src.cache.teacher import CacheTeacher
from src.cache.writer import CacheWriter

__all__ = ["Cache", "CacheTeacher", "CacheWriter", "CachedCorpus", "Manifest"]
