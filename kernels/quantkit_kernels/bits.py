"""Dense bit packing, least significant bit first, rows independent.

A row of b-bit codes is one bit string: code i occupies bits [b i, b i + b). Eight codes fill exactly b bytes,
so everything below works on bytes; the int32 words of the file are the same bytes, little-endian. 3 bits:

    byte 0: c2c2 c1c1c1 c0c0c0   byte 1: c5 c4c4c4 c3c3c3 c2   byte 2: c7c7c7 c6c6c6 c5c5
"""

from __future__ import annotations

import torch


def words(columns: int, bits: int) -> int:
    """int32 words of a row of `columns` codes."""
    return -(-columns * bits // 32)


def _matrix(tensor: torch.Tensor, name: str, bits: int) -> tuple[int, int]:
    """The sizes of a tensor [R, C] of codes; ValueError for another shape or width."""
    if tensor.dim() != 2:
        raise ValueError(f"{name} are a matrix [R, C], got {list(tensor.shape)}")
    if bits not in range(1, 9):
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    return tensor.shape[0], tensor.shape[1]


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [R, C], each below 2^bits, to int32 [R, ceil(C * bits / 32)]; padding bits are 0."""
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    rows, columns = _matrix(codes, "codes", bits)
    if bits == 8 and columns % 4 == 0:  # the bytes as they are
        return codes.clone(memory_format=torch.contiguous_format).view(torch.int32)
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    padded = torch.zeros(rows, -(-columns // 32) * 32, dtype=torch.uint8, device=codes.device)
    padded[:, :columns] = codes
    eights = padded.view(rows, -1, 8)  # (R, C/8, 8)
    out = torch.zeros(rows, eights.shape[1], bits, dtype=torch.uint8, device=codes.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        out[:, :, byte] |= eights[:, :, i] << shift
        if shift + bits > 8:
            out[:, :, byte + 1] |= eights[:, :, i] >> (8 - shift)
    return out.view(rows, -1).view(torch.int32)[:, : words(columns, bits)].contiguous()


def unpack_bits(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse: int32 [R, ceil(columns * bits / 32)] to uint8 codes [R, columns]."""
    if packed.dtype != torch.int32:
        raise TypeError(f"packed codes must be int32, got {packed.dtype}")
    rows, have = _matrix(packed, "packed codes", bits)
    if columns < 0 or have != words(columns, bits):
        raise ValueError(
            f"{columns} codes of {bits} bits need {words(columns, bits)} words per row, got {have}"
        )
    packed = packed.contiguous()
    if (
        packed.stride(-1) != 1
    ):  # rows of one word of a transposed tensor count as contiguous whatever the stride
        packed = packed.clone(memory_format=torch.contiguous_format)
    stream = packed.view(torch.uint8)  # (R, 4 * words)
    if bits == 8:
        return stream[:, :columns].clone(memory_format=torch.contiguous_format)
    short = -stream.shape[1] % bits
    if short:
        stream = torch.nn.functional.pad(stream, (0, short))
    stream = stream.view(rows, -1, bits)
    mask = 2**bits - 1
    out = torch.empty(rows, stream.shape[1], 8, dtype=torch.uint8, device=packed.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        value = stream[:, :, byte] >> shift
        if shift + bits > 8:
            value = value | (stream[:, :, byte + 1] << (8 - shift))
        torch.bitwise_and(value, mask, out=out[:, :, i])
    return out.view(rows, -1)[:, :columns]
