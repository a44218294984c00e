"""`sidestep maps`: pinned maps, decoded."""
