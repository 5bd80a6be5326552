"""What stands between the two projections of an MLP."""
