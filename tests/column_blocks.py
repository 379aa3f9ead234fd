"""Blocks of columns for the tests of GPTQ's loops."""

import torch


def arguments(bits=4, e=3, b=37, n=75, g=5, room=11, seed=0):
    """(weights, the columns of the block, a matrix for it, scale, low, high, groups).

    Weights [E, room + B, N] of which the block is a view, groups in any order, zero points beside the middle, values
    beyond the range.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(e, b + room, n, generator=generator)
    scale = torch.rand(e, g, n, generator=generator) * 2 / 2**bits + 0.01
    zero = torch.randint(0, 2**bits, (e, g, n), generator=generator).float()
    groups = torch.randint(0, g, (e, b), generator=generator, dtype=torch.int32)
    mix = torch.randn(e, b, 2 * b, generator=generator)
    matrix = mix @ mix.mT / b
    return whole, slice(room, room + b), matrix, scale, -zero, 2**bits - 1 - zero, groups
