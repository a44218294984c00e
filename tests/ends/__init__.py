"""How connections end when one of those who carry them is killed in the middle of a transfer."""
