"""`python -m sdjax` is the command line."""

from sdjax.cli import main

main()
