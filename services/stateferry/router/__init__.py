"""The public door: checks, tokenises, places and streams requests. Never imports torch."""
