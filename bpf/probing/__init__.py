"""Tries what a kernel can do: small programs, loaded, attached and seen to act."""
