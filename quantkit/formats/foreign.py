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
_NOT_READ = (False, "it has no reader of this format")
# quant_method that quantkit reads -> who else loads it: (name, whether, how). As they document; not tried.
LOADERS = {
    "auto-round": (
        ("transformers", True, "with the package auto-round"),
        ("vLLM", True, "4 or 8 bits, symmetric"),
    ),
    "awq": (("transformers", True, "with the package gptqmodel"), ("vLLM", True, "groups of 32, 64 or 128")),
    "bitsandbytes": (
        ("transformers", True, "with the package bitsandbytes"),
        ("vLLM", *_NOT_READ),
    ),
    "fp8": (("transformers", True, "decoded on a CPU"), ("vLLM", True, "blocks of 128")),
    "gptq": (
        ("transformers", True, "with the packages optimum and gptqmodel"),
        ("vLLM", True, "4 or 8 bits, symmetric, without desc_act over groups"),
    ),
    "modelopt": (("transformers", *_NOT_READ), ("vLLM", True, "FP8 and NVFP4")),
}
