"""Self-test of the kernels of 8-bit products, for `selfcheck.py`.

The inputs are chosen so that their codes are certain: none is near the middle of two. Then every output must match
fp64 on the codes of the twin, and repeat bit for bit: few and many tokens, inputs rounded inside and before, stored
ranges, K split over programs, a bias.
"""

from __future__ import annotations

import contextlib

import torch

from quantkit_kernels.reference import scaled_linear as twin
from quantkit_kernels.stored import Spec
from quantkit_kernels.triton.agreement import REPEATS, close, steady
from quantkit_kernels.triton.launch import chip
from quantkit_kernels.triton.scaled_layout import BLOCK, GROUP, NUMBERS
from quantkit_kernels.triton.scaled_op import Product, launch, rule

N, K = 208, 1024  # a ragged tile of rows, several trips of the loop for each split
STEP = 2.0**-5  # the scale of the inputs
ZERO = -100  # with which some inputs saturate
FP8_SLACK = 2.0**-8  # Hopper's tensor cores keep about 14 bits of a sum of FP8 products
_UNEVEN = 96


def scheme(spec: Spec, dtype: torch.dtype) -> tuple[str, bool, torch.dtype]:
    """What decides which kernels run: the arguments of `compare` behind the device."""
    return spec.inputs, spec.k % 128 == 0, dtype


@torch.no_grad()
def compare(device: torch.device, inputs: str, even: bool, dtype: torch.dtype) -> str | None:
    """How the kernels differ from fp64 on `device`, or None. even: K fills the columns of a trip."""
    number = NUMBERS[inputs]
    group = GROUP if inputs == "fp8-group" else K + (0 if even else _UNEVEN)
    k = K if inputs == "fp8-group" else group
    _, processors, _ = chip(device)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for m, splits, biased, stored, rows in _cases(inputs):
            given = _product(number, m, k, group, biased, stored, rows, dtype, device)
            config = rule(m, N, k, group, processors)._replace(splits=splits)
            runs = [torch.full((m, N), torch.nan, dtype=dtype, device=device) for _ in range(REPEATS)]
            for y in runs:
                launch(given, config, y)
            what = f"products with inputs {inputs} on {m} tokens{' of a stored range' if stored else ''}"
            if not close(runs[0], _truth(given, number, group), 0.0 if number == "int8" else FP8_SLACK):
                return f"{what} are not what the reference computes on this device"
            if not steady(runs):
                return f"two runs of {what} differ on this device"
    return None


def _cases(inputs: str) -> list[tuple[int, int, bool, bool, int]]:
    """(tokens, splits, with a bias, with a stored range, rows per scale)."""
    if inputs == "fp8-group":
        return [(1, 2, False, False, BLOCK), (16, 1, True, False, 1), (70, 1, False, False, BLOCK)]
    return [
        *((1, 2, False, False, 1), (16, 1, True, False, 1), (70, 1, False, False, 1)),
        *((1, 2, False, True, 1), (70, 1, True, True, 1)),
    ]


def _product(
    number: str,
    m: int,
    k: int,
    group: int,
    biased: bool,
    stored: bool,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Product:
    """A random product whose outputs are around 1; int8 with a stored range has a zero point."""
    g = torch.Generator().manual_seed(m)
    x, w = _inputs(number, m, k, group, stored, g), _codes(number, N, k, g)
    size = float(x.square().mean().sqrt() * w.float().square().mean().sqrt()) * k**0.5
    scale = (torch.rand(-(-N // rows), k // group, generator=g) + 0.5) / size
    shifted = stored and number == "int8"
    return Product(
        x.to(device, dtype),
        w.to(device),
        scale.to(device),
        torch.full((1,), STEP, device=device) if stored else None,
        torch.full((1,), ZERO, dtype=torch.int32, device=device) if shifted else None,
        w.sum(1, dtype=torch.int32).to(device) if shifted else None,
        torch.randn(N, generator=g).to(device) if biased else None,
        rows,
    )


def _inputs(number: str, m: int, k: int, group: int, stored: bool, g: torch.Generator) -> torch.Tensor:
    """x [M, K] in fp32, exact in bf16 and fp16 or nearly so: a quarter of a step or less beside its codes.

    A token's own scale is STEP. Inputs of a stored range fill half of it (int8), or twice of it, so that they saturate.
    """
    if number == "int8":
        levels = torch.randint(-127, 128, (m, k), generator=g).float()
        levels += torch.where(levels.abs() <= 31, 0.25, 0.0)
        levels[:, 0] = 127.5
    else:
        levels = _codes(number, m, k, g).float() * (1 + 2.0**-7)
        levels = levels.clamp(-448, 448)
        levels[:, ::group] = 448.0
    if stored:
        levels = (levels / 2).floor() + 0.25 if number == "int8" else levels * 2
    return levels * STEP


def _codes(number: str, n: int, k: int, g: torch.Generator) -> torch.Tensor:
    raw = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=g)
    if number == "int8":
        return raw.view(torch.int8)
    return torch.where(raw & 127 == 127, raw ^ 1, raw).view(torch.float8_e4m3fn)  # without NaN


def _truth(given: Product, number: str, group: int) -> torch.Tensor:
    """The product in fp64."""
    if given.x_scale is None:
        codes, scale = twin.quantize_inputs(given.x, number, group)
    else:
        codes = twin.quantize_inputs_by(given.x, number, given.x_scale, given.x_zero)
        scale = given.x_scale.view(1, 1)
    rest = (given.w, given.w_scale, given.bias, given.rows, torch.float64)
    return twin.scaled_linear(codes, scale, given.x_zero, *rest)
