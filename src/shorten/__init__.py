"""Shorten a model with one command: its settings, its stages, and the verb."""
