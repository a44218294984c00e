"""Ambient mode, the agent's half: which pods ztunnel is told of, and what it has answered."""
