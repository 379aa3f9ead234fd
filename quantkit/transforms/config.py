"""The options of every transform, without torch, so that a recipe validates at once."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# SmoothQuant's alpha by model type, where its authors publish one that differs from 0.5 (arXiv 2211.10438, table 9, and
# the README of their code: Llama 0.8 to 0.9, Mistral and Mixtral 0.8, Falcon 0.6 to 0.7).
ALPHAS = {"llama": 0.8, "mistral": 0.8, "mixtral": 0.8, "falcon": 0.6}
ALPHA = 0.5


class AwqConfig(BaseModel):
    """AWQ: scale the inputs that matter up before rounding, and fold the inverse into their producer.

    grid: exponents tried per scaling group, besides the identity. clip: search a clipping range per group
    after scaling; "auto" does it only when the algorithm is rtn. windows: calibration windows to measure on.
    scale: search scales at all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    name: Literal["awq"]
    grid: int = Field(20, ge=1, le=1000)
    clip: bool | Literal["auto"] = "auto"
    windows: int = Field(8, ge=1)
    scale: bool = True

    @property
    def observed(self) -> int:
        """Calibration windows whose inputs are in memory together."""
        return self.windows


class SmoothQuantConfig(BaseModel):
    """SmoothQuant: move the range of large input channels into the weights, and fold the inverse into their producer.

    alpha: how much of it, 0 to 1; "family": what the literature says of this family of models (`ALPHAS`), else 0.5;
    "auto": searched per scaling group. windows: calibration windows over which the largest inputs are taken; None: all.
    grid, search_windows: of "auto", steps from 0 to 1 and the calibration windows to measure on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    name: Literal["smoothquant"]
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["family", "auto"] = "family"
    windows: int | None = Field(None, ge=1)
    grid: int = Field(20, ge=1, le=1000)
    search_windows: int = Field(8, ge=1)

    @property
    def observed(self) -> int:
        """Calibration windows whose inputs are in memory together."""
        return self.search_windows if self.alpha == "auto" else 0

    @property
    def statistics(self) -> frozenset[str]:
        """Fields of kept statistics of all windows that serve instead of the windows themselves; empty: none do."""
        return frozenset() if self.alpha == "auto" or self.windows is not None else frozenset({"amax"})

    def strengths(self, model_type: str) -> list[float]:
        """The values of alpha to try for a family of models; only those of "auto" are several."""
        if self.alpha == "auto":
            return [step / self.grid for step in range(self.grid + 1)]
        return [ALPHAS.get(model_type, ALPHA) if self.alpha == "family" else self.alpha]


class SmoothQuantPlusConfig(BaseModel):
    """SmoothQuant+: SmoothQuant with one strength for the whole model, chosen by what the quantized model loses.

    strength: 0 to 1, "none" for no smoothing, or "search". search: "coarse" tries 0, 0.25, ... 1 and no smoothing, then
    steps of 0.05 around the best; "full" tries every step of 0.05. search_windows: calibration windows on which the
    quantized models are compared. beside: how many of them travel through the model together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    name: Literal["smoothquant_plus"]
    strength: Annotated[float, Field(ge=0, le=1)] | Literal["none", "search"] = "search"
    search: Literal["coarse", "full"] = "coarse"
    search_windows: int = Field(32, ge=1)
    beside: int = Field(6, ge=1, le=64)

    @property
    def windows(self) -> int | None:
        """Calibration windows over which the largest inputs are taken: all (None), if anything is smoothed; a walk
        carries at least one.
        """
        return 1 if self.strength == "none" else None

    @property
    def statistics(self) -> frozenset[str]:
        """Fields of kept statistics of all windows that serve instead of the windows themselves."""
        return frozenset() if self.strength == "none" else frozenset({"amax"})

    @property
    def searched(self) -> int:
        """Windows of hidden states that the search carries beside those of the original model."""
        return self.beside * self.search_windows if self.strength == "search" else 0


TransformConfig = Annotated[
    AwqConfig | SmoothQuantConfig | SmoothQuantPlusConfig, Field(discriminator="name")
]
