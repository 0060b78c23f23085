"""The errors that a user can do something about. Each message says what was given and what is allowed.

What is replaced, cut, ignored or not known in a request is no error but a warning, `PromptWarning`. Functions that find
such things take `warn`, which is called with a message: the facade collects them in `Request.warnings`.
"""

import warnings
from collections.abc import Callable
from typing import TypeAlias

Warn: TypeAlias = Callable[[str], None]
"""Called with one message, a line without a full stop."""


class PromptWarning(UserWarning):
    """Something in a request was replaced, cut or ignored, or the model does not know it: the picture lacks it."""


def warn_caller(message: str) -> None:
    """Warn where the function was called that found it: the default of `warn` arguments."""
    warnings.warn(message, PromptWarning, stacklevel=3)


class SdjaxError(Exception):
    """Any of them; the command line prints it in one line and exits with 1."""


class CheckpointError(SdjaxError, ValueError):
    """A checkpoint that can't be found, read, or understood."""


class RequestError(SdjaxError, ValueError):
    """An argument of a picture that can't be honoured."""


class NotFiniteError(SdjaxError, ArithmeticError):
    """The numbers ran out of range: there is no picture, and a black one would be a lie."""
