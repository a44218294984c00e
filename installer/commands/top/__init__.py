"""`sidestep top`: the node's pods live in the terminal."""
