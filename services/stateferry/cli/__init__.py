"""The command line. Commands of clients never import torch, so that they start at once."""

from stateferry.cli.app import main

__all__ = ["main"]
