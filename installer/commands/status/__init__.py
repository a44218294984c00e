"""`sidestep status`: programs, maps, chain, agent."""
