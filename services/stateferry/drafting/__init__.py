"""Guesses at the next tokens of a sequence, which a verification then proves or throws away."""
