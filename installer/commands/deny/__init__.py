"""`sidestep deny`: the ports that pods deny, and closing what is older than they are."""
