"""What `sidestep explain` says of one connection, and trying it."""
