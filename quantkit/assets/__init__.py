"""The embedded models and texts, and the shipped recipes: where they lie. Nothing is read here."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent
_PACKAGED_RECIPES = _HERE.parent / "_recipes"  # in a wheel
_CHECKOUT_RECIPES = _HERE.parent.parent / "recipes"  # in a checkout or an editable install


def default_model() -> Path:
    """The folder of bookworm-8m, a small Llama-type model."""
    return _HERE / "bookworm-8m"


def mixture_model() -> Path:
    """The folder of bookworm-moe-6m, a small Mixtral-type model of 4 blocks with 8 experts each."""
    return _HERE / "bookworm-moe-6m"


def calibration_text() -> Path:
    return _HERE / "calibration.txt"


def evaluation_text() -> Path:
    return _HERE / "evaluation.txt"


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in _recipes().glob("*.yaml"))


def recipe_path(name: str) -> Path | None:
    """The file of a shipped recipe, or None if there is none of that name."""
    return _recipes() / f"{name}.yaml" if name in recipe_names() else None


def _recipes() -> Path:
    return _PACKAGED_RECIPES if _PACKAGED_RECIPES.is_dir() else _CHECKOUT_RECIPES
