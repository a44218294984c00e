"""`sidestep deny`: shows the ports that pods deny, and resets connections that are older than the denial."""
