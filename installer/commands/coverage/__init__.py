"""`sidestep coverage`: what goes past the proxies."""
