"""What `sidestep maps` shows: pinned maps, decoded."""
