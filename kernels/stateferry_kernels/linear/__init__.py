"""Projections whose rows do not depend on how many rows share the call."""
