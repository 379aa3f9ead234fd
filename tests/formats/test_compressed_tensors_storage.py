"""The tensors of every format of compressed-tensors: shapes, bytes, and the way through the kernels' form and back."""

import pytest
import torch
from quantkit_kernels import Spec
from quantkit_kernels.reference.wna16_linear import dequantize

from quantkit.algorithms.rtn import on_grid, rtn
from quantkit.errors import ModelError
from quantkit.formats.registry import codec
from quantkit.numerics.inputs import InputScale
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import NUMBERS, PRESETS, Grid, Scheme

CT = codec("compressed-tensors")
STORABLE = [name for name in PRESETS if name != "NF4"]
N, K = 200, 256  # 200 rows: the last block of 128 is ragged


def input_scale(scheme):
    """Any calibrated range, for a scheme whose inputs have one."""
    if scheme.inputs is None or scheme.inputs.dynamic:
        return None
    zero = None if scheme.inputs.symmetric else torch.tensor([-7], dtype=torch.int8)
    return InputScale(torch.tensor([0.25], dtype=torch.bfloat16), zero)


def made(scheme, n=N, k=K):
    """(weight, tensors) of random numbers rounded to nearest."""
    weight = rtn(
        torch.randn(n, k, generator=torch.Generator().manual_seed(0)), scheme.weights, torch.bfloat16
    )
    return weight, CT.pack_scheme(weight, scheme, input_scale(scheme))


def some_weight(grid, n=N, k=K):
    """Random codes and scales as an algorithm gives them; rows that share a scale repeat it."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**grid.bits, (n, k), dtype=torch.uint8, generator=g)
    if grid.number.name == "fp8_e4m3":
        codes[codes % 128 == 127] = 0  # NaN
    groups = k // grid.group(k)
    rows = {"tensor": n, "block": grid.group_size}.get(grid.granularity, 1)
    scale = torch.rand(-(-n // rows), groups, generator=g).repeat_interleave(rows, 0)[:n] + 0.5
    kinds = {"e8m0": torch.float8_e8m0fnu, "fp8_e4m3": torch.float8_e4m3fn, None: torch.bfloat16}
    zero = None
    if not grid.symmetric:
        zero = torch.randint(0, 2**grid.bits, (n, groups), dtype=torch.uint8, generator=g)
    return QuantizedWeight(
        codes, scale.to(kinds[grid.scale]), zero, grid, torch.tensor([1234.5]) if grid.two_level else None
    )


def same_bytes(one, other):
    assert one.dtype == other.dtype
    assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", STORABLE)
def test_what_is_packed_has_its_shapes_and_comes_back(name):
    scheme = PRESETS[name]
    weight, inputs = some_weight(scheme.weights), input_scale(scheme)
    tensors = CT.pack_scheme(weight, scheme, inputs)
    assert {leaf: tuple(t.shape) for leaf, t in tensors.items()} == CT.shapes(N, K, scheme)
    dtypes = CT.dtypes(scheme)
    assert all(t.dtype == (dtypes[leaf] or torch.bfloat16) for leaf, t in tensors.items())
    assert CT.dimensions(tensors, scheme) == (N, K)
    back = CT.unpack(tensors, scheme)
    for part in ("codes", "scale", "zero", "global_scale"):
        one, other = getattr(back, part), getattr(weight, part)
        assert (one is None) == (other is None), part
        if one is not None:
            same_bytes(one, other)
    assert torch.equal(back.dequantize(), weight.dequantize())
    found = CT.inputs_of(tensors)
    assert (found is None) == (inputs is None)
    if found is not None and inputs is not None:
        assert torch.equal(found.scale, inputs.scale)
        assert (found.zero is None) == (inputs.zero is None)


@pytest.mark.parametrize("name", STORABLE)
@pytest.mark.parametrize("k", [256, 384])
def test_kernels_see_the_same_weight_and_give_the_same_bytes_back(name, k):
    scheme = PRESETS[name]
    grid = scheme.weights
    weight, tensors = made(scheme, k=k)
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
    weight, tensors = made(scheme, 3, 7)
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
    weight, tensors = made(scheme)
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
    _, tensors = made(scheme)
    for leaf in tensors:
        missing = {key: t for key, t in tensors.items() if key != leaf}
        with pytest.raises(ModelError):
            CT.unpack(missing, scheme)
        with pytest.raises(ModelError):
            CT.unpack(tensors | {leaf: tensors[leaf][None]}, scheme)


def test_shapes_are_those_of_llmcompressor():
    """Names and shapes of its files for [200, 256]; see docs/checkpoint.md."""
    assert CT.shapes(200, 256, PRESETS["FP8_BLOCK"])["weight_scale"] == (2, 2)
    assert CT.shapes(200, 256, PRESETS["FP8"]) == {
        "weight": (200, 256),
        "weight_scale": (1,),
        "input_scale": (1,),
    }
    nvfp4 = {"weight_packed": (200, 128), "weight_scale": (200, 16), "weight_global_scale": (1,)}
    assert CT.shapes(200, 256, PRESETS["NVFP4A16"]) == nvfp4
    assert CT.shapes(200, 256, PRESETS["W8A8"]) == {"weight": (200, 256), "weight_scale": (200, 1)}


def test_even_columns_of_fp4_are_in_the_low_half():
    grid = PRESETS["MXFP4A16"].weights
    codes = torch.arange(32, dtype=torch.uint8).view(1, 32) % 16
    weight = QuantizedWeight(codes, torch.ones(1, 1).to(torch.float8_e8m0fnu), None, grid)
    tensors = CT.pack(weight)
    assert tensors["weight_packed"][0, :2].tolist() == [0x10, 0x32]
    assert tensors["weight_scale"].tolist() == [[127]]
