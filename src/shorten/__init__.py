"""The ``shorten`` verb: shortens a model with one command, with settings that it chooses itself."""
