"""Mamba-2 serving kernels in grid form. Knows tensors, slots and positions; knows no requests."""
