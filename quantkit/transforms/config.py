"""The options of every transform, without torch, so that a recipe validates at once."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


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


TransformConfig = AwqConfig
