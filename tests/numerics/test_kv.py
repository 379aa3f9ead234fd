"""Entries of a KV cache on each grid, against the arithmetic of those who defined it."""

import pytest
import torch

from quantkit.numerics.hadamard import hadamard
from quantkit.numerics.kv import KVScales, decode, encode, rounded
from quantkit.scheme import KV_PRESETS, NUMBERS, Grid, KVScheme

B, H, T, D = 2, 3, 64, 32
SCALES = KVScales(torch.tensor([0.02]), torch.tensor([0.01, 0.02, 0.03])[:, None, None])


@pytest.fixture(scope="module")
def x():
    return torch.randn(B, H, T, D, generator=torch.Generator().manual_seed(3)) * 3


def test_int8_is_that_of_vllm(x):
    """vllm, triton_reshape_and_cache_flash: absmax / 127 with a floor, trunc(x / s +- 0.5)."""
    grid = KV_PRESETS["INT8"].keys
    x = x.clone()
    x[0, 0, 0] = 0
    x[0, 0, 1] = torch.tensor([127.0, 0.5, 1.5, -0.5, -1.5, *[0.0] * (D - 5)])  # scale 1: halves
    codes = encode(x, grid)
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-6)
    levels = x * (1 / scale)
    expected = torch.where(levels >= 0, levels + 0.5, levels - 0.5).clamp(-128, 127).to(torch.int8)
    assert torch.equal(codes.codes, expected)
    assert codes.codes[0, 0, 1, :5].tolist() == [127, 1, 2, -1, -2]
    assert codes.scale[0, 0, 0] == pytest.approx(1e-6)
    assert torch.equal(decode(codes, grid, torch.float32), expected * scale)


def test_int4_has_fifteen_levels(x):
    codes = encode(x, KV_PRESETS["INT4"].keys)
    assert (int(codes.codes.min()), int(codes.codes.max())) == (-7, 7)
    error = (decode(codes, KV_PRESETS["INT4"].keys, torch.float32) - x).abs()
    assert bool((error <= codes.scale / 2 * (1 + 1e-5)).all())


@pytest.mark.parametrize("name", ["keys", "values"])
def test_fp8_is_that_of_compressed_tensors(x, name):
    scale = getattr(SCALES, name)
    grid = Grid(NUMBERS["fp8_e4m3"], "tensor" if scale.numel() == 1 else "head")
    expected = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(decode(encode(x, grid, scale), grid, torch.float32), expected)
    beyond = encode(torch.full_like(x, 1e4), grid, scale).codes.float()
    assert bool((beyond == 448).all())


@pytest.mark.parametrize("preset", ["KIVI4", "KIVI2"])
def test_kivi_keys_are_grouped_over_tokens_and_values_over_channels(x, preset):
    scheme = KV_PRESETS[preset]
    keys, values = encode(x, scheme.keys), encode(x, scheme.values)
    assert keys.scale.shape == keys.low.shape == (B, H, T // 32, D)
    assert values.scale.shape == values.low.shape == (B, H, T, D // 32)
    assert {keys.scale.dtype, keys.low.dtype} == {torch.float16}
    for codes, grid, dim in ((keys, scheme.keys, 2), (values, scheme.values, 3)):
        group = x.unflatten(dim, (-1, 32))
        half = (group.amax(dim + 1) - group.amin(dim + 1)) / (2**grid.bits - 1) / 2
        error = (decode(codes, grid, torch.float32) - x).abs().unflatten(dim, (-1, 32))
        assert bool((error <= 1.02 * half.unsqueeze(dim + 1) + 5e-3).all())
        assert int(codes.codes.max()) == grid.qmax
    permuted = torch.randperm(D)
    again = decode(encode(x[..., permuted], scheme.keys), scheme.keys, torch.float32)
    assert torch.equal(again, decode(keys, scheme.keys, torch.float32)[..., permuted])


def test_a_constant_group_is_kept():
    grid = KV_PRESETS["KIVI4"].values
    x = torch.full((1, 1, 2, 32), 1.5)
    assert torch.equal(decode(encode(x, grid), grid, torch.float32), x)


def test_entries_keep_their_dtype(x):
    half = x.bfloat16()
    for name in ("INT8", "INT4", "FP8"):
        keys, values = rounded(half, half, KV_PRESETS[name], SCALES)
        assert keys.dtype == values.dtype == torch.bfloat16


def test_a_rotation_leaves_products_and_spreads_an_outlier(x):
    q, k = x, x.flip(2).clone()
    assert torch.allclose(hadamard(q) @ hadamard(k).mT, q @ k.mT, atol=1e-3)
    assert torch.allclose(hadamard(hadamard(k)), k, atol=1e-5)
    k[..., 5] *= 50
    scheme = KV_PRESETS["INT4"]
    plain = KVScheme(scheme.keys, scheme.values)
    turned, straight = (rounded(k, k, each)[0] for each in (scheme, plain))
    others = [c for c in range(D) if c != 5]
    assert (turned - k)[..., others].square().mean() < 0.6 * (straight - k)[..., others].square().mean()
    with pytest.raises(ValueError, match="power of two of channels, got 48"):
        hadamard(torch.zeros(1, 48))


def test_sinks_stay_exact(x):
    scheme = KVScheme(KV_PRESETS["INT4"].keys, KV_PRESETS["INT4"].values, sinks=4, rotate=True)
    for before, after in zip((x, x), rounded(x, x, scheme), strict=True):
        assert torch.equal(after[:, :, :4], before[:, :, :4])
        assert not torch.equal(after[:, :, 4:], before[:, :, 4:])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda x: encode(x, KV_PRESETS["FP8"].keys), "needs stored scales"),
        (lambda x: encode(x[:, :, :40], KV_PRESETS["KIVI4"].keys), "40 tokens are not whole groups of 32"),
        (lambda x: encode(x[..., :20], KV_PRESETS["KIVI4"].values), "20 channels are not whole groups"),
        (lambda x: rounded(x, x, KV_PRESETS["KIVI4"]), "rounds entries later"),
    ],
)
def test_what_cannot_be_rounded_is_told(x, call, told):
    with pytest.raises(ValueError, match=told):
        call(x)
