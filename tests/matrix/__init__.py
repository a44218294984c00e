"""`make matrix`: real programs through Envoys as istiod configures them, at each level, every byte compared."""
