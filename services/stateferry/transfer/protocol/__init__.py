"""The hand-off protocol without I/O: what both sides decide, told what happened.

No clock, no event loop, no memory: `expectation`, `session` and `lane` drive these machines, and a
simulator drives them through drops, repeats, late writes and crashes.
"""
