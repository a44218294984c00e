"""Reads and changes what is inside a network namespace: addresses, routes, sockets, processes, listeners."""
