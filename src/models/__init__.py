"""Load any Hugging Face decoder, find its layers, put gates on them, cut it."""
