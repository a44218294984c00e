"""What the probe looks at besides the kernel's features; each function returns rows and raises nothing."""
