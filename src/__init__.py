"""e3pruner: learn which units of a language model to remove, recover what was lost, prove the result."""
