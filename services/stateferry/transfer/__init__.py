"""Hand-off of one sequence's state between workers: reserve -> push -> seal -> release.

::

    HandoffSender -> Lane -> Channel -> Connection == UCX or inproc ==> Connection -> Session
                                                                                        |
    decode worker <- Expectation <- HandoffReceiver <-----------------------------------+

A hand-off may come in several parts, each pushed as above; the last one seals it. What both sides
decide is in ``protocol``, without I/O. Segments are opaque: (kind, layer, dtype, shape, bytes).
Nothing here knows a model.
"""
