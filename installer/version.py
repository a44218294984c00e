"""Which sidestep this is. Said here alone: the application runs from its folder and is never installed."""

VERSION = "0.1.0"
