"""stateferry: serving Mamba-2 language models on a cluster that separates prefill from decode."""

__version__ = "0.1.0"
