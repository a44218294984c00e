"""What `sidestep trace` shows: events as they come."""
