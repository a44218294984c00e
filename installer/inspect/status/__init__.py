"""What `sidestep status` shows: programs, maps, chain, agent."""
