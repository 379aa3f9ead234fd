"""What the codes of numbers that are no integers stand for (`stored.TABLES`).

nf4: quantiles of the normal distribution (QLoRA, Dettmers et al. 2023, appendix E). fp8_e4m3: the bytes of torch's
float8_e4m3fn. fp4_e2m1: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats, 5.3.3).
"""

from __future__ import annotations

import functools

import torch

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@functools.lru_cache(maxsize=64)
def table(number: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The value of every code, `dtype` [2^bits]."""
    if number == "fp8_e4m3":
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)
    else:
        values = torch.tensor({"nf4": _NF4, "fp4_e2m1": (*_FP4, *(-v for v in _FP4))}[number], dtype=dtype)
    return values.to(device)
