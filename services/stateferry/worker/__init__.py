"""What prefill and decode workers have in common: building blocks, not a base class."""
