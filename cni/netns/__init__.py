"""What is read and done inside a network namespace: addresses, routes, sockets, processes, listeners."""
