"""The export verb: a plain Hugging Face directory, proven equal to what was trained."""
