"""`sidestep top`: shows the node's pods live in the terminal."""
