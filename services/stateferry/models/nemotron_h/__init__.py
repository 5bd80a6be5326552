"""Nemotron-H: its configuration and its model."""
