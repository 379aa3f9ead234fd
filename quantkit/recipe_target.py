"""The part of a recipe that says what will serve the result: `target`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from quantkit.preflight.target import DEVICES, ENGINES, MOST, Target
from quantkit.recipe_schemes import Part

if TYPE_CHECKING:
    EngineName = str
    DeviceName = str
else:
    from typing import Literal

    EngineName = Literal[ENGINES]
    DeviceName = Literal[tuple(DEVICES)]


class TargetPart(Part):
    """What must be able to run the result; what it would refuse is refused before anything is computed.

    tensor_parallel: devices that share each layer. gpu: their kind; None: any that the engine runs on.
    """

    engine: EngineName
    tensor_parallel: Annotated[int, Field(ge=1, le=MOST)] = 1
    gpu: DeviceName | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        """`target: vllm` is short for {engine: vllm}."""
        return {"engine": value} if isinstance(value, str) else value

    @property
    def asked(self) -> Target:
        return Target(self.engine, self.tensor_parallel, self.gpu)
