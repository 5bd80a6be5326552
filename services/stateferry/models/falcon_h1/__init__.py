"""Falcon-H1: its configuration and its model."""
