"""Whole slots of a pool, all layers at once: copy, clear, and scatter after a verify of steps."""
