"""Prefill and decode in one process over one state pool: no router, no hand-off."""
