"""Post-training quantization of Hugging Face causal LMs: a recipe gives a measured, verified checkpoint.

Everything is imported on first use, so that `import quantkit` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "quantize": ("quantkit.pipeline.quantize", "quantize"),
    "quantize_in_memory": ("quantkit.pipeline.in_memory", "quantize_in_memory"),
    "generate": ("quantkit.runtime", "generate"),
    "load": ("quantkit.checkpoint.load", "load"),
    "evaluate": ("quantkit_eval", "evaluate"),
    "inspect": ("quantkit.checkpoint.inspect", "inspect_checkpoint"),
    "diff": ("quantkit.pipeline.diff", "diff_checkpoints"),
    "examine_calibration": ("quantkit.pipeline.doctor", "examine_calibration"),
    "reproduce": ("quantkit.pipeline.reproduce", "reproduce"),
    "validate": ("quantkit.validation", "validate"),
    "load_recipe": ("quantkit.recipe.recipe", "load_recipe"),
    "Recipe": ("quantkit.recipe.recipe", "Recipe"),
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
