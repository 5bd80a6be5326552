"""Mamba-2: its configuration and its model."""
