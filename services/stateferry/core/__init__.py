"""Plain values every other package speaks in: requests, ids, errors, clocks. Stdlib only."""
