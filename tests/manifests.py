"""Manifests to build upon: one that says nothing, and one that says something in every field."""

from dataclasses import replace

from quantkit_eval import Fit, Report

from quantkit.checkpoint.manifest import SCHEMA
from quantkit.checkpoint.records import (
    Calibration,
    Code,
    FileRecord,
    LayerRecord,
    Manifest,
    Origin,
    Size,
    TensorRecord,
)

SIZE = Size(original_bytes=160, quantized_bytes=40, linear_bits_per_weight=4.125, model_bits_per_weight=4.5)
EMPTY = Manifest(
    schema=SCHEMA,
    identity={},
    size=SIZE,
    layers=[],
    scaling=[],
    tensors={},
    files={},
    notes=[],
)
FULL = Manifest(
    schema=SCHEMA,
    identity={"recipe": {"bits": 4}, "data": None},
    size=replace(SIZE, original_linear_bits_per_weight=16.0),
    layers=[
        LayerRecord(
            "a", "W4A16 g32 sym", "gptq", 0.25, 0.125, 0.5, {"damping": 0.01, "dead_columns": 2}, ["why"]
        ),
        LayerRecord("b", "W4A16 g32 sym", "rtn", 0.25, 0.125, 0.5),
    ],
    scaling=[{"transform": "awq", "producer": None, "exponent": None}],
    tensors={
        "a.weight": TensorRecord("quantized", ["a.weight_packed", "a.weight_scale"]),
        "mask": TensorRecord("dropped", reason="not used"),
    },
    files={
        "model.safetensors": FileRecord("0" * 64, 40, {"a": "00000000"}),
        "config.json": FileRecord("1" * 64, 4),
    },
    notes=["naïve"],
    recipe={"weights": {"bits": 4}},
    model=Origin("acme/tiny", "llama"),
    code=Code("0.1.0", "2" * 64),
    calibration=Calibration(["3 windows"], [{"name": "text", "samples": 3, "sha256": "3" * 64}]),
    left_out={"onnx/": "it has weights of its own"},
    evaluation=Report(
        512, 2, 256, 256, ["text"], "4" * 64, Fit(21.125, 0.5, 3.0, 0.25), Fit(21.0, None, 3.0, None)
    ),
)
