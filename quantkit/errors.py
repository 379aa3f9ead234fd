"""Every error quantkit raises on purpose.

    QuantkitError
    ├── UserError               the input is wrong; exit code 2, no traceback
    │   ├── RecipeError         a recipe or an override
    │   ├── ModelError          a checkpoint that is missing, corrupt, unsupported or does not fit the recipe
    │   ├── DataError           calibration or evaluation text
    │   ├── OutputError         the output folder: taken by another run, full, not writable
    │   └── BackendError        a kernel backend that was asked for by name and is missing
    └── RunError                the run itself failed; exit code 1
        ├── NumericalError      non-finite or collapsed layers, no positive-definite Hessian at any damping
        └── VerificationError   what was written is not what was computed

Each message says what, got, and what to do.
"""


class QuantkitError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class UserError(QuantkitError):
    """The input is wrong; nothing was computed from it."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe, a rule or a `--set` override."""


class ModelError(UserError):
    """A checkpoint that is missing, corrupt, unsupported, or does not fit the recipe."""


class DataError(UserError):
    """Calibration or evaluation text."""


class OutputError(UserError):
    """The output folder: taken by another run, full, or not writable."""


class BackendError(UserError):
    """A kernel backend was asked for by name and is not available."""


class RunError(QuantkitError):
    """The run failed although its input was right."""


class NumericalError(RunError):
    """A layer became non-finite or collapsed."""


class VerificationError(RunError):
    """The files do not hold what was computed."""
