"""Few masks for many prompts, and the router that names one of them for a prompt."""
