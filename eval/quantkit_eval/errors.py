"""What evaluation refuses, in words."""


class EvalError(ValueError):
    """The model, the text or the options cannot be evaluated; the message says what, got, and what to do."""

    exit_code = 2


class BrokenModel(EvalError):
    """The model ran and its output is no probability distribution: a failed run, not a wrong input."""

    exit_code = 1
