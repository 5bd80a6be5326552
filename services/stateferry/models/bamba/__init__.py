"""Bamba: its configuration and its model."""
