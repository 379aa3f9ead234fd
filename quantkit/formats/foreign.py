"""How quantized checkpoints of other tools, and of quantkit, name their tensors; without torch."""

from __future__ import annotations

import re

QUANTIZED_TENSOR = re.compile(r"\.(qweight|qzeros|weight_packed|weight_scale(_inv)?|absmax|SCB)$")
