"""The OpenAI-compatible HTTP door of the router's process."""
