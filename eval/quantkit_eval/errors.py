"""What evaluation refuses, in words."""


class EvalError(ValueError):
    """The model, the text or the options cannot be evaluated; the message says what, got, and what to do."""
