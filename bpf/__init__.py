"""The kernel half of sidestep: BPF programs, and the Python that compiles, attaches and talks to them."""
