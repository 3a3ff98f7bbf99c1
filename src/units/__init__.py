"""Units are what a mask removes (layers, halves, KV groups, channels); spaces say in which combinations."""
