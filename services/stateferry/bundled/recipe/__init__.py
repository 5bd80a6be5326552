"""Rebuilds the bundled language model from public packages."""
