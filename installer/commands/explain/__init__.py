"""`sidestep explain`: what becomes of one connection and why, and trying it."""
