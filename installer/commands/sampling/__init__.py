"""The node's counters and connections at a moment, for `sidestep report` and `sidestep top`."""
