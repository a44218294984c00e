"""`sidestep trace`: events as they come."""
