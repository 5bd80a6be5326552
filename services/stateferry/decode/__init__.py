"""The decode worker: receives a sequence's state, then streams its tokens."""
