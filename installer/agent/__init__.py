"""The running agent: start, reconciliation, repair, health, metrics, logs, signals."""
