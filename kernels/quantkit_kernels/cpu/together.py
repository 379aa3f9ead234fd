"""One native step for several sequences, and where the time of steps goes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from quantkit_kernels.cpu.decoder import Decoder

PARTS = ("linears", "experts", "head", "attention", "rest")  # qk::Part


def step_together(
    decoders: Sequence[Decoder], tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Append one token to each decoder; fp32 logits [B, vocabulary]. Weights are read once for all of them.

    decoders: B different ones over the same tables, with one compute and cache. tokens: int64 [B]; cos, sin:
    [B, rotary_dim] of their positions. Logits equal those of B single steps bit for bit, but for weights in NF4 and
    FP8, whose sums are fp32 in another order. ValueError for decoders or tokens that do not fit, MemoryError.
    """
    count, size = len(decoders), decoders[0].tables.rotary_dim if decoders else 0
    angles = all(t.shape == (count, size) and t.is_cpu and t.is_floating_point() for t in (cos, sin))
    if not (count and tokens.shape == (count,) and tokens.dtype == torch.int64 and tokens.is_cpu and angles):
        raise ValueError(
            f"wanted int64 tokens [{count}], cos and sin [{count}, {size}] on the CPU for {count} decoders, got "
            f"{tokens.dtype} {list(tokens.shape)}, {list(cos.shape)}, {list(sin.shape)}"
        )
    first = decoders[0]
    tokens, cos, sin = tokens.contiguous(), cos.float().contiguous(), sin.float().contiguous()
    logits = torch.empty(count, first.tables.head.n)
    failed = first.library.qk_decoder_step_together(
        (ctypes.c_void_p * count)(*(each.handle for each in decoders)),
        count,
        tokens.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        logits.data_ptr(),
        torch.get_num_threads(),
    )
    if failed == 2:
        raise MemoryError(f"no memory for a token of {count} sequences")
    if failed:
        raise ValueError(
            "the decoder refused a step of several sequences; are they different ones of one model, and the tokens "
            "in its vocabulary?"
        )
    return logits


@contextmanager
def timed(decoder: Decoder) -> Iterator[dict[str, float]]:
    """Seconds that steps in this decoder's memory spend in each of PARTS; complete when the block ends.

    These are its own steps, and steps together of which it is the first.
    """
    seconds = (ctypes.c_double * len(PARTS))()
    found = dict.fromkeys(PARTS, 0.0)
    decoder.library.qk_decoder_time(decoder.handle, ctypes.addressof(seconds))
    try:
        yield found
    finally:
        decoder.library.qk_decoder_time(decoder.handle, None)
        found.update(zip(PARTS, seconds, strict=True))
