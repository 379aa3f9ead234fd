"""The tensors of every format of compressed-tensors: shapes, bytes, and the way through the kernels' form and back."""

import pytest
import torch
from quantkit_kernels import Spec
from quantkit_kernels.reference.wna16_linear import dequantize

from quantkit.algorithms.rtn import on_grid, rtn
from quantkit.errors import ModelError
from quantkit.formats.registry import codec
from quantkit.numerics.inputs import InputScale
from quantkit.scheme import NUMBERS, PRESETS, Grid, Scheme

CT = codec("compressed-tensors")
STORABLE = [name for name in PRESETS if name != "NF4"]
N, K = 200, 256  # 200 rows: the last block of 128 is ragged


def made(scheme, n=N, k=K, dtype=torch.bfloat16):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    weight = rtn(w, scheme.weights, dtype)
    inputs = None
    if scheme.inputs is not None and not scheme.inputs.dynamic:
        zero = None if scheme.inputs.symmetric else torch.tensor([-3], dtype=torch.int8)
        inputs = InputScale(torch.tensor([0.02]).to(dtype), zero)
    return w, weight, CT.pack_scheme(weight, scheme, inputs)


@pytest.mark.parametrize("name", STORABLE)
def test_what_is_packed_has_its_shapes_and_comes_back(name):
    scheme = PRESETS[name]
    _, weight, tensors = made(scheme)
    assert {leaf: tuple(t.shape) for leaf, t in tensors.items()} == CT.shapes(N, K, scheme)
    dtypes = CT.dtypes(scheme)
    assert all(t.dtype == (dtypes[leaf] or torch.bfloat16) for leaf, t in tensors.items())
    assert CT.dimensions(tensors, scheme) == (N, K)
    back = CT.unpack(tensors, scheme)
    for part in ("codes", "scale", "zero", "global_scale"):
        one, other = getattr(back, part), getattr(weight, part)
        assert one is other or torch.equal(
            one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
        ), part


@pytest.mark.parametrize("name", STORABLE)
@pytest.mark.parametrize("k", [256, 384])
def test_kernels_see_the_same_weight_and_give_the_same_bytes_back(name, k):
    scheme = PRESETS[name]
    grid = scheme.weights
    _, weight, tensors = made(scheme, k=k)
    spec = Spec(grid.number.name, grid.bits, grid.group(k), grid.symmetric, N, k)
    stored = CT.stored(tensors, spec, scheme)
    assert torch.equal(dequantize(stored, torch.float32), weight.dequantize())
    apart = {leaf: t for leaf, t in tensors.items() if leaf in CT.apart}
    back = CT.from_stored(stored, scheme, apart)
    assert back.keys() == tensors.keys()
    for leaf, t in tensors.items():
        assert back[leaf].dtype == t.dtype
        assert torch.equal(back[leaf].view(torch.uint8), t.view(torch.uint8)), leaf


def test_rows_that_are_no_whole_words():
    scheme = PRESETS["W8A16_FP8"]
    _, weight, tensors = made(scheme, 3, 7)
    stored = CT.stored(tensors, Spec("fp8_e4m3", 8, 7, True, 3, 7), scheme)
    assert torch.equal(dequantize(stored, torch.float32), weight.dequantize())


def as_hex(tensor):
    return tensor.view(torch.uint8).flatten().numpy().tobytes().hex(" ").upper()


def test_golden_bytes_of_nvfp4_and_mxfp4():
    """One block of 16 with the largest weight 0.75: levels 6 -4 2 0 ... times 448 / 3584; formats.md of the format."""
    levels = torch.tensor([6, -4, 2, 0, -6, 4, -3, 1, 3, -1.5, 0.5, -6, 3, -0.5, 1.5, -3])[None]
    w = levels * 0.125
    nv = CT.pack(rtn(w, PRESETS["NVFP4A16"].weights, torch.bfloat16))
    assert as_hex(nv["weight_packed"]) == "E7 04 6F 2D B5 F1 95 D3"
    assert as_hex(nv["weight_scale"]) == "7E"
    assert nv["weight_global_scale"].tolist() == [3584]
    mx = CT.pack(rtn(torch.cat([w, w], 1), PRESETS["MXFP4A16"].weights, torch.bfloat16))
    assert as_hex(mx["weight_packed"]) == "E7 04 6F 2D B5 F1 95 D3 " + "E7 04 6F 2D B5 F1 95 D3"
    assert as_hex(mx["weight_scale"]) == "7C"


def test_integers_with_quantized_inputs_are_signed_bytes():
    for name, low in (("W8A8", -128), ("W4A8", -8)):
        scheme = PRESETS[name]
        grid = scheme.weights
        one = torch.ones(1, 1)
        zero = torch.full((1, 1), float(grid.midpoint))
        w = torch.arange(low, -low, dtype=torch.float32).repeat(128 // -low)[None, :256]
        tensors = CT.pack_scheme(
            on_grid(w[:, : grid.group(w.shape[1])], one, zero, grid, torch.bfloat16), scheme
        )
        assert tensors["weight"].tolist() == w[:, : grid.group(w.shape[1])].to(torch.int8).tolist()


def test_negative_zero_of_fp4_survives():
    scheme = PRESETS["MXFP4A16"]
    _, weight, tensors = made(scheme)
    weight.codes[0, 0] = 8
    tensors = CT.pack(weight)
    stored = CT.stored(tensors, Spec("fp4_e2m1", 4, 32, True, N, K), scheme)
    assert dequantize(stored, torch.float32)[0, 0] == 0
    assert torch.equal(CT.from_stored(stored, scheme, {})["weight_packed"], tensors["weight_packed"])


def test_what_has_no_format_is_refused_with_what_to_do():
    for grid in (
        PRESETS["NF4"].weights,
        Grid(NUMBERS["fp8_e5m2"], "channel"),
        Grid(NUMBERS["int8"], "tensor"),
    ):
        with pytest.raises(ModelError, match="compressed-tensors has no format for"):
            CT.shapes(4, 64, Scheme(grid))


@pytest.mark.parametrize("name", STORABLE)
def test_tensors_of_a_wrong_shape_are_refused(name):
    scheme = PRESETS[name]
    _, _, tensors = made(scheme)
    for leaf in tensors:
        missing = {key: t for key, t in tensors.items() if key != leaf}
        with pytest.raises(ModelError):
            CT.unpack(missing, scheme)
        with pytest.raises(ModelError):
            CT.unpack(tensors | {leaf: tensors[leaf][None]}, scheme)
