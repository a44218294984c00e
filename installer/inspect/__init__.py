"""What the maps of this node say, for people: read-only, with and without a running agent."""
