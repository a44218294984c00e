"""The running agent: its start, reconciliation, repair, health, metrics, logs, signals."""
