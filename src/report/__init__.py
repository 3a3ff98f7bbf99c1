"""The report verb: figures of a run as a table, JSON, Markdown and HTML."""
