"""What is written to the kernel about a pod, and kept true: entries, admission, adoption, following, denial."""
