"""Evaluation of causal language models: perplexity, divergence from a baseline, generation speed.

Knows nothing of quantization: baseline and candidate are any two transformers causal LMs and run the same code
on the same tokens.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY = {
    "evaluate": "quantkit_eval.measure",
    "explain": "quantkit_eval.attribution",
    "Explanation": "quantkit_eval.explanation",
    "Seen": "quantkit_eval.attribution",
    "long_generation": "quantkit_eval.long_texts",
    "Side": "quantkit_eval.long_texts",
    "exact_cache": "quantkit_eval.long_texts",
    "LongReport": "quantkit_eval.long_report",
    "run_tasks": "quantkit_eval.tasks",
    "TaskReport": "quantkit_eval.task_report",
    "Report": "quantkit_eval.report",
    "Fit": "quantkit_eval.report",
    "table": "quantkit_eval.report",
    "WindowScores": "quantkit_eval.paired",
    "Comparison": "quantkit_eval.paired",
    "compare_all": "quantkit_eval.paired",
    "load_text": "quantkit_eval.text",
    "generate_stream": "quantkit_eval.generation",
    "generate_batch": "quantkit_eval.generation",
    "Generation": "quantkit_eval.generation",
    "BatchGeneration": "quantkit_eval.generation",
    "EvalError": "quantkit_eval.errors",
}
__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'quantkit_eval' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
