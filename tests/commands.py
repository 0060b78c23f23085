"""The command line in a process of its own."""

import sys

_INTERRUPTIBLE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from sdjax.cli import main
main()
"""


def interruptible(*arguments):
    """`sdjax` with these arguments, which heeds interrupts even where a shell in the background turned them off."""
    return [sys.executable, "-c", _INTERRUPTIBLE, *map(str, arguments)]
