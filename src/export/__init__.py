"""The verb ``export``: write the cut model as a plain Hugging Face directory, proven before it is kept."""
