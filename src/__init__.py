"""e3pruner: learn which whole layers of a language model to remove, recover it, prove the result."""
