"""The order of the steps: recipe -> plan -> calibrate -> quantize -> write -> verify -> evaluate."""

from quantkit.pipeline.run import Result, quantize

__all__ = ["Result", "quantize"]
