"""How cost grows, and what strategies and quantised teachers give away: ``python -m scripts.scale``."""
