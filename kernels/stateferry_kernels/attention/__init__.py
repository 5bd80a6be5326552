"""Causal grouped-query attention over paged keys and values."""
