"""The errors that a user can do something about. Each message says what was given and what is allowed."""


class SdjaxError(Exception):
    """Any of them; the command line prints it in one line and exits with 1."""


class CheckpointError(SdjaxError, ValueError):
    """A checkpoint that can't be found, read, or understood."""


class RequestError(SdjaxError, ValueError):
    """An argument of a picture that can't be honoured."""


class NotFiniteError(SdjaxError, ArithmeticError):
    """The numbers ran out of range: there is no picture, and a black one would be a lie."""
