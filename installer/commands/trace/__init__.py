"""`sidestep trace`: shows events as they happen."""
