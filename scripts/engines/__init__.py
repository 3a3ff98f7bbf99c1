"""Engines that share no code with transformers serve exported models: the same tokens, and how fast."""
