import pytest
import torch
from quantkit_kernels import pack_bits, unpack_bits, words


def bit_string(codes: list[int], bits: int) -> list[int]:
    """The words by definition: one long integer, code i at bit b i."""
    total = sum(code << (i * bits) for i, code in enumerate(codes))
    count = words(len(codes), bits)
    unsigned = [(total >> (32 * w)) & 0xFFFFFFFF for w in range(count)]
    return [u - (1 << 32) if u >> 31 else u for u in unsigned]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 32), (5, 33), (2, 100), (1, 129)])
def test_packed_words_are_the_bit_string_and_come_back(bits, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [bit_string(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_bits(packed, bits, shape[1]), codes)


def test_one_word_of_a_transposed_tensor():
    codes = torch.arange(24, dtype=torch.uint8).view(3, 8) % 16
    packed = torch.empty(1, 3, dtype=torch.int32).copy_(pack_bits(codes, 4).T).T
    assert packed.stride() == (1, 3)
    assert torch.equal(unpack_bits(packed, 4, 8), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_padding_bits_are_zero(bits):
    full = torch.full((2, 5), 2**bits - 1, dtype=torch.uint8)
    last = int(pack_bits(full, bits)[0, -1]) & 0xFFFFFFFF
    assert last >> (5 * bits % 32 or 32) == 0


def test_bad_codes_and_lengths_are_refused():
    with pytest.raises(ValueError, match="16 does not fit in 4 bits"):
        pack_bits(torch.tensor([[16]], dtype=torch.uint8), 4)
    with pytest.raises(TypeError, match="int64"):
        pack_bits(torch.tensor([[1]]), 4)
    with pytest.raises(ValueError, match="need 2 words per row, got 1"):
        unpack_bits(torch.zeros(1, 1, dtype=torch.int32), 4, 9)


def test_words_of_whole_bytes_are_copies():
    """Eight bits need no packing, but what is packed must not change with the codes, nor the other way round."""
    codes = torch.arange(32, dtype=torch.uint8).view(4, 8)
    packed = pack_bits(codes, 8)
    back = unpack_bits(packed, 8, 8)
    codes.zero_()
    assert torch.equal(back, torch.arange(32, dtype=torch.uint8).view(4, 8))
    back.zero_()
    assert torch.equal(unpack_bits(packed, 8, 7), torch.arange(32, dtype=torch.uint8).view(4, 8)[:, :7])
    turned = torch.arange(16, dtype=torch.uint8).view(4, 4).T
    assert pack_bits(turned, 8).flatten().tolist() == [0x0C080400, 0x0D090501, 0x0E0A0602, 0x0F0B0703]
