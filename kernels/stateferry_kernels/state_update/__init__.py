"""The decode row and the commit: one token at a time, one state write per grid interval."""
