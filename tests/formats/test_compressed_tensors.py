import pytest
import torch

from quantkit.errors import ModelError
from quantkit.formats.registry import codec
from quantkit.layers.quant_linear import QuantLinear
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Scheme, integer

CT = codec("compressed-tensors")


def quantized(signed, scheme, zero=None):
    """One row of signed codes as a QuantizedWeight with scale 1."""
    codes = (torch.tensor([signed]) + scheme.weights.midpoint).to(torch.uint8)
    groups = codes.shape[1] // scheme.weights.group(codes.shape[1])
    return QuantizedWeight(codes, torch.ones(1, groups), zero, scheme.weights)


def as_hex(tensor):
    return [f"{int(word) & 0xFFFFFFFF:08X}" for word in tensor.flatten()]


# Words of reference packers (compressed-tensors 0.20) for one row of 16 weights.
GOLDEN = [
    (4, True, [7, -5, 2, 0, -7, 6, -3, 1, 4, -2, 0, -7, 4, -1, 2, -4], "95E18A3F 4A7C186C"),
    (4, False, [7, -6, 1, -1, -8, 5, -4, 0, 3, -3, -1, -8, 3, -2, 1, -5], "84D0792F 396B075B"),
    (3, True, [3, -2, 1, 0, -3, 3, -2, 1, 2, -1, 0, -3, 2, 0, 1, -2], "1EAB9957 00005663"),
    (
        8,
        True,
        [127, -88, 41, 0, -112, 104, -56, 19, 73, -31, 7, -126, 63, -15, 27, -70],
        "80A928FF 9348E810 028761C9 3A9B71BF",
    ),
]


@pytest.mark.parametrize(("bits", "symmetric", "signed", "words"), GOLDEN)
def test_golden_words(bits, symmetric, signed, words):
    scheme = Scheme(integer(bits, 16, symmetric))
    zero = None if symmetric else torch.tensor([[7]], dtype=torch.uint8)
    tensors = CT.pack(quantized(signed, scheme, zero))
    assert as_hex(tensors["weight_packed"]) == words.split()
    assert tensors["weight_shape"].tolist() == [1, 16]


def test_golden_zero_points_are_packed_along_rows():
    zero = (torch.tensor([[-1, 0, 3, -8, 7, 2, -2, 1]]).T + 8).to(torch.uint8)
    codes = torch.zeros(8, 16, dtype=torch.uint8)
    tensors = CT.pack(QuantizedWeight(codes, torch.ones(8, 1), zero, integer(4, 16, False)))
    assert as_hex(tensors["weight_zero_point"]) == ["96AF0B87"]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("n", "k", "group"), [(1, 16, 16), (9, 66, 22), (33, 40, None), (5, 7, 7)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pack_unpack_roundtrip(bits, n, k, group, symmetric):
    g = torch.Generator().manual_seed(n)
    scheme = Scheme(integer(bits, group, symmetric))
    groups = k // scheme.weights.group(k)
    zero = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8, generator=g)
    weight = QuantizedWeight(
        torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=g),
        torch.rand(n, groups, generator=g).bfloat16(),
        None if symmetric else zero,
        scheme.weights,
    )
    tensors = CT.pack(weight)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == CT.shapes(n, k, scheme)
    assert all(t.is_contiguous() for t in tensors.values())
    back = CT.unpack(tensors, scheme)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scale, weight.scale)
    assert (back.zero is None) == symmetric
    assert symmetric or torch.equal(back.zero, zero)


def test_unpack_names_what_is_missing_foreign_or_mis_shaped():
    scheme = Scheme(integer(4, 16, True))
    tensors = CT.pack(quantized(GOLDEN[0][2], scheme))
    with pytest.raises(ModelError, match="weight_zero_point"):
        CT.unpack(tensors, Scheme(integer(4, 16, False)))
    with pytest.raises(ModelError, match="weight_scale"):
        CT.unpack({k: t for k, t in tensors.items() if k != "weight_scale"}, scheme)
    with pytest.raises(ModelError, match=r"weight_packed of a W4A16 g16 sym \[1, 16\] linear is \(1, 2\)"):
        CT.unpack(tensors | {"weight_packed": torch.zeros(1, 3, dtype=torch.int32)}, scheme)


FOUR, EIGHT = Scheme(integer(4, 128, True)), Scheme(integer(8, None, False))


def test_config_of_one_scheme_targets_the_class():
    config = CT.config({"a.q": FOUR, "a.k": FOUR}, ["lm_head"])
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    scheme_of = CT.parse(config)
    assert scheme_of("a.q") == FOUR
    assert scheme_of("lm_head") is None


def test_config_of_several_schemes_targets_names():
    layers = {"a.q": FOUR, "a.down": EIGHT, "b.q": FOUR, "b.down": EIGHT}
    scheme_of = CT.parse(CT.config(layers, ["lm_head"]))
    assert {name: scheme_of(name) for name in layers} == layers
    assert scheme_of("lm_head") is None
    assert scheme_of("c.q") is None


def group(targets, bits, **changes):
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    return {"targets": targets, "weights": weights | changes}


def config_of(*groups, **changes):
    base = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": []}
    return base | {"config_groups": {f"group_{i}": g for i, g in enumerate(groups)}} | changes


def test_targets_match_as_in_compressed_tensors():
    scheme_of = CT.parse(
        config_of(
            group(["Linear"], 2),
            group(["re:.*down"], 3),
            group(["a.down_proj"], 8),
            ignore=["re:.*gate$", "head"],
        )
    )
    bits = {
        name: scheme_of(name) and scheme_of(name).weights.bits
        for name in ("a.q", "b.down_proj", "a.down_proj", "a.gate", "head")
    }
    assert bits == {"a.q": 2, "b.down_proj": 3, "a.down_proj": 8, "a.gate": None, "head": None}
    assert CT.parse(config_of(group(["re:down"], 3)))("a.down") is None  # from the start of the name
    assert CT.parse(config_of(group(["a"], 3)))("b") is None
    assert CT.parse(config_of(group(["Linear"], 4), format="mixed-precision"))("a") == Scheme(
        integer(4, 128, True)
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, "'gptq'"),
        (config_of(group(["Linear"], 8), format="int-quantized"), "'int-quantized'"),
        (config_of(), "no config_groups"),
        (config_of(group(["Linear"], 4) | {"input_activations": {"num_bits": 8}}), "stores W4A8"),
        (config_of(group(["Linear"], 4) | {"input_activations": {"num_bits": 4}}), "inputs as int4"),
        (config_of(group(["Linear"], 4) | {"output_activations": {"num_bits": 8}}), "output_activations"),
        (config_of(group(["Linear"], 4) | {"format": "float-quantized"}), "'float-quantized'"),
        (config_of(group([], 4)), "no targets"),
        (config_of(group(["Linear"], 4, type="float")), "fp4_e2m1 weights"),
        (config_of(group(["Linear"], 4, strategy="tensor")), "'tensor'"),
        (config_of(group(["Linear"], 4, actorder="columns")), "actorder .columns."),
        (config_of(group(["Linear"], 16)), "num_bits 16"),
        (config_of(group(["Linear"], 4), kv_cache_scheme={"num_bits": 4}), "kv_cache_scheme"),
        (config_of(group(["Linear"], 4), transform_config={"x": 1}), "transform_config"),
    ],
)
def test_what_is_not_read_is_refused(config, message):
    with pytest.raises(ModelError, match=message):
        CT.parse(config)


def test_columns_out_of_order_come_back_and_are_multiplied_by_their_own_inputs():
    """weight_g_idx of older files: the weight, the tensors and the product of a layer."""
    generator = torch.Generator().manual_seed(5)
    grid, order = integer(4, 16), torch.randperm(64, generator=generator)
    codes = torch.randint(16, (24, 64), generator=generator, dtype=torch.uint8)
    scale = torch.rand(24, 4, generator=generator) + 0.5
    weight = QuantizedWeight(codes, scale, None, grid, order=order)
    dense = torch.empty(24, 64)
    dense[:, order] = QuantizedWeight(codes, scale, None, grid).dequantize()
    assert torch.equal(weight.dequantize(), dense)
    tensors = codec().pack(weight)
    assert tensors["weight_g_idx"].dtype == torch.int32
    back = codec().unpack(tensors, Scheme(grid))
    assert torch.equal(back.dequantize(), dense)
    x = torch.randn(3, 64, generator=generator)
    layer = QuantLinear.from_quantized(back, None)
    assert layer.ordered
    torch.testing.assert_close(layer(x), x @ dense.T, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="does not give each of 4 groups as many columns"):
        codec().unpack(tensors | {"weight_g_idx": torch.zeros(64, dtype=torch.int32)}, Scheme(grid))
