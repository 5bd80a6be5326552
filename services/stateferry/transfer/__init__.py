"""Hand-off of one sequence's state between workers: reserve -> push -> seal -> release.

::

    HandoffSender -> Lane -> Channel -> Connection == UCX or inproc ==> Connection -> Session
                                                                                        |
    decode worker <- Expectation <- HandoffReceiver <-----------------------------------+

Segments are opaque: (kind, layer, dtype, shape, bytes). Nothing here knows a model.
"""
