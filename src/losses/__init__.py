"""Losses on a teacher's signal: what the teacher said, how far the student is, how much a token counts."""
