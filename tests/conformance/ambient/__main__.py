"""`python -m tests.conformance.ambient [--kinds PATTERN] [CONFIGURATION…]`."""

from tests.conformance.ambient.run import main

main()
