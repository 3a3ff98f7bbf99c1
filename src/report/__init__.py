"""The ``report`` verb: gathers the figures of a run into a table, JSON, Markdown and HTML."""
