"""Any Hugging Face decoder: find its layers, gate them, cut them, load it."""
