"""`python -m tests.conformance [--kinds PATTERN] [CONFIGURATION…]`."""

from tests.conformance.run import main

main()
