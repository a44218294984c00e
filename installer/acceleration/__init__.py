"""How far connections within the node are accelerated: the trial of this kernel, and what follows from it."""
