"""Metrics and logs: how a process shows from outside what it does."""
