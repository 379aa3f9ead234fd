"""The parts of a recipe that say what the result must be: `target` (who serves it, how large) and `gate` (how good)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from quantkit.preflight.target import DEVICES, ENGINES, MOST, Target
from quantkit.recipe.schemes import (
    WEIGHT_KEYS,
    Bits,
    Granularity,
    GroupSize,
    Part,
    ScaleName,
    SchemePart,
    scheme_of,
)
from quantkit.recipe.sizes import Size
from quantkit.scheme import KV_PRESETS, NUMBERS, PRESETS, Scheme

if TYPE_CHECKING:
    EngineName = str
    DeviceName = str
    NumberName = str
    CacheName = str
    SensitivityName = str
else:
    from typing import Literal

    EngineName = Literal[ENGINES]
    DeviceName = Literal[tuple(DEVICES)]
    NumberName = Literal[tuple(NUMBERS)]
    CacheName = Literal[("none", *(name for name, kv in KV_PRESETS.items() if not kv.residual))]
    SensitivityName = Literal["kl", "scaled", "error", "relative"]

GOALS = ("bits_per_weight", "size", "memory")  # a target that one of these is given for is searched
LIMITS = ("kl_mean", "kl_p99", "perplexity")
_SEARCH = ("choices", "sensitivity", "windows")
_SERVING = ("context", "batch", "kv_caches")


class Choice(SchemePart):
    """A scheme of weights that a search may give a linear: keys as in `weights`, or the name of a preset."""

    number: NumberName | None = None
    bits: Bits = 4
    granularity: Granularity | None = None
    group_size: GroupSize = 128
    symmetric: bool = True
    scale: ScaleName | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        """`W4A16` is short for {preset: W4A16}; its inputs must be 16 bits, as a target chooses weights alone."""
        if isinstance(value, str):
            value = {"preset": value}
        name = value.get("preset") if isinstance(value, dict) else None
        if name is not None and name not in PRESETS:
            raise ValueError(f"unknown preset; known: {', '.join(PRESETS)}, got {name!r}")
        if name is not None and PRESETS[name].inputs is not None:
            raise ValueError(
                f"{name} rounds inputs too, and a target chooses weights alone; give `bits` instead"
            )
        return value

    @model_validator(mode="after")
    def _is_a_scheme(self) -> Self:
        _ = self.scheme
        return self

    @property
    def scheme(self) -> Scheme:
        """Of the weights alone."""
        return scheme_of({key: getattr(self, key) for key in WEIGHT_KEYS}, None)


class TargetPart(Part):
    """What must be able to run the result, and how large it may be.

    engine: what it would refuse is refused before anything is computed. tensor_parallel: devices that share each layer.
    gpu: their kind; None: any that the engine runs on. bits_per_weight: of the quantized linears, with scales; size: of
    all stored tensors; memory: of the weights, the KV cache of `batch` sequences of `context` tokens, and activations;
    at most one of the three, in bytes the last two. choices: the schemes to choose from; None: usual ones. kv_caches:
    the caches to choose from. sensitivity, windows: how what a scheme costs is estimated (docs/mixed-precision.md), on
    how many calibration windows.
    """

    engine: EngineName | None = None
    tensor_parallel: Annotated[int, Field(ge=1, le=MOST)] = 1
    gpu: DeviceName | None = None
    bits_per_weight: Annotated[float, Field(gt=0, le=16)] | None = None
    size: Size | None = None
    memory: Size | None = None
    context: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    batch: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    kv_caches: Annotated[tuple[CacheName, ...], Field(strict=False, min_length=1)] | None = None
    choices: Annotated[tuple[Choice, ...], Field(strict=False, min_length=1)] | None = None
    sensitivity: SensitivityName | None = None
    windows: Annotated[int, Field(ge=1, le=100_000)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        """`target: vllm` is short for {engine: vllm}."""
        return {"engine": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        goals = [key for key in GOALS if getattr(self, key) is not None]
        if len(goals) > 1:
            raise ValueError(f"{' and '.join(goals)} are given; keep one of them")
        if not goals and self.engine is None:
            raise ValueError(f"give an engine ({', '.join(ENGINES)}), or one of {', '.join(GOALS)}")
        if self.engine is None and (self.gpu is not None or self.tensor_parallel > 1):
            raise ValueError("tensor_parallel and gpu are those of an engine; give one")
        search = [key for key in _SEARCH if getattr(self, key) is not None]
        if search and not goals:
            raise ValueError(f"{', '.join(search)}: for a target of size; give one of {', '.join(GOALS)}")
        serving = [key for key in _SERVING if getattr(self, key) is not None]
        if serving and self.memory is None:
            raise ValueError(f"{', '.join(serving)}: for a target of memory; give memory, or remove them")
        if self.memory is not None and self.sensitivity in ("error", "relative"):
            raise ValueError(
                f"sensitivity: {self.sensitivity} is no KL, which the KV cache is weighed against; use scaled or kl"
            )
        if self.memory is not None and self.context is None:
            raise ValueError("memory needs the context it is for, in tokens, such as context: 32768")
        return self

    @property
    def asked(self) -> Target | None:
        """Who serves the result, if the recipe says so."""
        return None if self.engine is None else Target(self.engine, self.tensor_parallel, self.gpu)

    @property
    def unsearched(self) -> TargetPart | None:
        """The same without what is searched for: who serves the result, if the recipe says so."""
        if self.engine is None:
            return None
        return TargetPart(engine=self.engine, tensor_parallel=self.tensor_parallel, gpu=self.gpu)

    @property
    def goal(self) -> str | None:
        """Which size is asked for."""
        return next((key for key in GOALS if getattr(self, key) is not None), None)


def _limit(value: Any) -> Any:
    """`+1%` of the original's perplexity, or a perplexity."""
    if isinstance(value, str) and not re.fullmatch(r"\+\d+(\.\d+)?%", value):
        raise ValueError(f"a share of the original's, such as '+1%', or a perplexity, got {value!r}")
    if isinstance(value, str) and not float(value[1:-1]):
        raise ValueError("no quantized model is that close; give more than +0%")
    if isinstance(value, int | float) and not isinstance(value, bool) and not value > 1:
        raise ValueError(f"a perplexity is more than 1, got {value!r}")
    return float(value) if type(value) is int else value


class GatePart(Part):
    """What the closing evaluation must show; otherwise layers get more bits.

    A limit is kept if the whole confidence interval lies under it. kl_mean, kl_p99: of the tokens, in nats. perplexity:
    '+1%' above that of the original, from paired differences, or a number. max_bits_per_weight: where giving up begins.
    """

    kl_mean: Annotated[float, Field(gt=0)] | None = None
    kl_p99: Annotated[float, Field(gt=0)] | None = None
    perplexity: Annotated[str | float, BeforeValidator(_limit)] | None = None
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    max_bits_per_weight: Annotated[float, Field(gt=0, le=16)] = 8.5

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if all(getattr(self, key) is None for key in LIMITS):
            raise ValueError(f"give at least one of {', '.join(LIMITS)}")
        return self

    @property
    def limits(self) -> dict[str, float | str]:
        """What is limited, and to what."""
        return {key: getattr(self, key) for key in LIMITS if getattr(self, key) is not None}
