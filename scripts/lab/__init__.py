"""What the scripts share: jobs in fresh processes, results with their origin, pages filled from them."""
