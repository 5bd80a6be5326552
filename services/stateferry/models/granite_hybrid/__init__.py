"""Granite 4 hybrid: its configuration and its model."""
