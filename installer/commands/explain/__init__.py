"""`sidestep explain`: says where one connection would go and why, and can try it."""
