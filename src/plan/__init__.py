"""Work out from its config what a run will cost: no weight is loaded, no step is trained."""
