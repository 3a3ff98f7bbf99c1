"""What a run will cost, worked out from its config: no weight is loaded, no step is trained."""
