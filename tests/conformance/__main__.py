"""`python -m tests.conformance [CONFIGURATION…]`."""

from tests.conformance.run import main

main()
