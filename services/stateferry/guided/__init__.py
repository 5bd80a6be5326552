"""Outputs of a given form: JSON schemas, expressions and grammars, through llguidance."""
