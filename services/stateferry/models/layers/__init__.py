"""Layers that the architectures share. Each takes rows and a step, and returns rows."""
