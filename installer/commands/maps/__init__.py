"""`sidestep maps`: lists the pinned maps, and their entries in readable form."""
