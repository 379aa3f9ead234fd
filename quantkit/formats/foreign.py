"""Quantized checkpoints of other tools: how they name their tensors, and who wrote which method; without torch."""

from __future__ import annotations

import re

QUANTIZED_TENSOR = re.compile(r"\.(qweight|qzeros|weight_packed|weight_scale(_inv)?|absmax|SCB)$")

METHODS = {  # quant_method -> the tool that writes it
    "auto-round": "AutoRound",
    "awq": "AutoAWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "fine-grained FP8",
    "gptq": "GPTQModel or AutoGPTQ",
    "hqq": "HQQ",
    "modelopt": "NVIDIA ModelOpt",
    "mxfp4": "MXFP4 of transformers",
    "quark": "AMD Quark",
    "torchao": "torchao",
}
