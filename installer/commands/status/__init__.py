"""`sidestep status`: shows the programs, maps, CNI chain and agent of this node."""
