"""The options of every algorithm, without torch, so that a recipe validates at once."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

RangeSearch = Literal["minmax", "mse", "weighted"]
STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RtnConfig(BaseModel):
    """Round to nearest.

    range: how the grid of each group is chosen: its extremes, the least squared error, or the least squared
    error weighted by the mean square of each input. refit: rounds of least-squares scale refit after it.
    """

    model_config = STRICT
    name: Literal["rtn"]
    range: RangeSearch = "mse"
    refit: int = Field(0, ge=0, le=16)

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Statistics` that calibration must collect; empty when no text is needed."""
        return frozenset({"mean_square"}) if self.range == "weighted" else frozenset()


class GptqConfig(BaseModel):
    """GPTQ: column by column, each rounding error spread over the columns still to come.

    order: the order of the columns; `group_aware` keeps groups whole. groups: grids chosen from the original
    weight (static) or from the updated one when its group is reached (dynamic; `order: none` only). damping:
    share of the Hessian's mean diagonal added to it. block: columns per lazy update. refine: sweeps of
    coordinate descent afterwards. retarget: 0..1, how far the target moves to the full-precision inputs.
    true_sequential: within a block, later linears are calibrated behind the earlier ones quantized. stream: whose
    inputs the Hessian is of: those behind the quantized layers, or those in the original model, which do not depend on
    the scheme, so that many schemes can share them; then `retarget` is 0 and `true_sequential` false.
    """

    model_config = STRICT
    name: Literal["gptq"]
    order: Literal["activation", "none", "group_aware"] = "activation"
    groups: Literal["static", "dynamic"] = "static"
    damping: float = Field(0.01, ge=0, le=1)
    block: int = Field(128, ge=1, le=65536)
    range: RangeSearch = "mse"
    refine: int = Field(4, ge=0, le=100)
    retarget: float = Field(1.0, ge=0, le=1)
    true_sequential: bool = True
    stream: Literal["quantized", "original"] = "quantized"

    @model_validator(mode="before")
    @classmethod
    def _original_follows_nothing(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("stream") == "original":
            return {"retarget": 0.0, "true_sequential": False} | value
        return value

    @model_validator(mode="after")
    def _original_stays_original(self) -> Self:
        if self.stream == "original" and (self.retarget or self.true_sequential):
            raise ValueError(
                "stream: original never sees quantized layers, so it needs retarget: 0 and true_sequential: false; "
                "leave both keys out"
            )
        return self

    @model_validator(mode="after")
    def _dynamic_groups_need_natural_order(self) -> Self:
        if self.groups == "dynamic" and self.order != "none":
            raise ValueError(
                f"groups: dynamic needs order: none, got order: {self.order}; set one of the two"
            )
        return self

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Statistics` that calibration must collect."""
        needs = {"hessian"}
        if self.retarget:
            needs.add("drift")
        if self.range == "weighted":
            needs.add("mean_square")
        return frozenset(needs)


AlgorithmConfig = Annotated[RtnConfig | GptqConfig, Field(discriminator="name")]
