"""`sidestep bugreport`: all that is known of this node, in one archive that may be passed on."""
