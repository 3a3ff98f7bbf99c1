"""What can be removed from a decoder, and in which combinations."""
