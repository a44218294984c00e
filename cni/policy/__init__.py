"""What a Pod asks for, decided without looking at a node: membership, annotations, the capture decision. Pure."""
