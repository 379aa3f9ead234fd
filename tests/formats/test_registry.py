"""The registry of formats: a second one from outside runs everywhere, and no other room knows a tensor's name."""

import ast
from pathlib import Path

import pytest
import quantkit_kernels
import tiny_models
import torch
from quantkit_kernels.cpu import library
from safetensors.torch import load_file

import quantkit
from quantkit.checkpoint.inspect import inspect_checkpoint
from quantkit.checkpoint.plugin import packed_linears
from quantkit.errors import ModelError, RecipeError
from quantkit.formats import registry
from quantkit.formats.registry import Codec, codec, codec_of, register
from quantkit.numerics.weight import QuantizedWeight
from quantkit.recipe.recipe import parse_recipe
from quantkit.scheme import integer

ROOT = Path(__file__).resolve().parents[2]


class Toy(Codec):
    """One byte per code, columns first; steps and zero points [K/G, N]; every layer listed by name."""

    name = "toy"
    method = "toy-bytes"
    leaves = {"columns": torch.uint8, "steps": None, "origins": torch.int16}  # noqa: RUF012
    scale = "steps"

    def shapes(self, n, k, scheme):
        groups = (k // scheme.weights.group(k), n)
        shapes = {"columns": (k, n), "steps": groups}
        return shapes if scheme.weights.symmetric else shapes | {"origins": groups}

    def pack(self, weight):
        tensors = {"columns": weight.codes.T.contiguous(), "steps": weight.scale.T.contiguous()}
        if weight.zero is not None:
            tensors["origins"] = weight.zero.T.short().contiguous()
        return tensors

    def unpack(self, tensors, scheme):
        n, k = self.dimensions(tensors, scheme)
        if {leaf: tuple(t.shape) for leaf, t in tensors.items()} != self.shapes(n, k, scheme):
            raise ModelError("the tensors do not fit")
        zero = tensors["origins"].T.to(torch.uint8).contiguous() if "origins" in tensors else None
        return QuantizedWeight(
            tensors["columns"].T.contiguous(), tensors["steps"].T.contiguous(), zero, scheme.weights
        )

    def dimensions(self, tensors, scheme):
        return tuple(tensors["columns"].shape[::-1])

    def config(self, schemes, ignore, kv=None):
        layers = {n: [s.weights.bits, s.weights.group_size, s.weights.symmetric] for n, s in schemes.items()}
        return {"quant_method": self.method, "layers": layers}

    def parse(self, config):
        from quantkit.scheme import Scheme

        known = {name: Scheme(integer(*values)) for name, values in config["layers"].items()}
        return known.get


@pytest.fixture
def toy(monkeypatch):
    for name in registry.names():
        codec(name)  # imported, and so registered for good
    monkeypatch.setattr(registry, "CODECS", dict(registry.CODECS))
    register(Toy)
    return codec("toy")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save(
        tiny_models.build("llama-gqa"), tmp_path_factory.mktemp("model") / "m", torch.bfloat16
    )


def made(model, folder, file_format, symmetric):
    weights = {"bits": 4, "group_size": 32, "symmetric": symmetric, "algorithm": "rtn"}
    recipe = {"weights": weights, "output": {"format": file_format}}
    quantkit.quantize(recipe, model, folder, evaluate=False)
    return folder


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_format_from_outside_goes_from_recipe_to_every_backend(model, toy, tmp_path, symmetric):
    ours = made(model, tmp_path / "ours", "compressed-tensors", symmetric)
    theirs = made(model, tmp_path / "theirs", "toy", symmetric)
    names = {name.rpartition(".")[2] for name in load_file(theirs / "model-00001-of-00004.safetensors")}
    assert names >= {"columns", "steps"}
    assert not names & (codec().leaves.keys() - {"weight"})
    ids = tiny_models.ids(9, batch=2)
    backends = [name for name in ("reference", "torch", "cpu") if name != "cpu" or library.available()]
    for backend in backends:
        with torch.no_grad():
            one, other = (quantkit.load(f, device="cpu", backend=backend) for f in (ours, theirs))
            assert {module.backend for _, module in packed_linears(other)} == {backend}
            assert torch.equal(one(ids).logits, other(ids).logits)
    quantkit.load(theirs, device="cpu", dtype="auto", verify=True).save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    for shard in theirs.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            assert torch.equal(tensor, again[name]), name
    layers = [[layer["scheme"], layer["shape"]] for layer in inspect_checkpoint(theirs)["layers"]]
    assert layers == [[layer["scheme"], layer["shape"]] for layer in inspect_checkpoint(ours)["layers"]]


def test_a_format_without_a_place_for_the_scales_of_a_cache_is_refused_before_the_run(toy):
    for cache in ("FP8", "FP8_TENSOR"):
        with pytest.raises(RecipeError, match="the format toy stores no scales of a KV cache"):
            parse_recipe({"weights": {"algorithm": "rtn"}, "kv_cache": cache, "output": {"format": "toy"}})
    parse_recipe({"weights": {"algorithm": "rtn"}, "kv_cache": "INT8", "output": {"format": "toy"}})


def test_an_unknown_format_lists_the_known_ones():
    with pytest.raises(KeyError, match="compressed-tensors"):
        codec("toy")
    with pytest.raises(RecipeError, match=r"output.format(.|\n)*known: compressed-tensors"):
        parse_recipe({"weights": {"bits": 4}, "output": {"format": "toy"}})
    with pytest.raises(ModelError, match=r"'hqq'.*'compressed-tensors'"):
        codec_of({"quant_method": "hqq"})


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("grid", [integer(4, 32), integer(3, 16, False), integer(8, None)], ids=str)
def test_stored_and_back_is_the_same_bytes(name, grid):
    from quantkit_kernels import Spec

    from quantkit.scheme import Scheme

    n, k = 24, 64
    g = torch.Generator().manual_seed(0)
    groups = k // grid.group(k)
    zero = (
        None
        if grid.symmetric
        else torch.randint(0, grid.qmax + 1, (n, groups), dtype=torch.uint8, generator=g)
    )
    codes = torch.randint(0, grid.qmax + 1, (n, k), dtype=torch.uint8, generator=g)
    weight = QuantizedWeight(codes, torch.rand(n, groups, generator=g).bfloat16(), zero, grid)
    format_, scheme = codec(name), Scheme(grid)
    tensors = format_.pack(weight)
    assert {leaf: tuple(t.shape) for leaf, t in tensors.items()} == format_.shapes(n, k, scheme)
    assert format_.dimensions(tensors, scheme) == (n, k)
    spec = Spec(grid.number.name, grid.bits, grid.group(k), grid.symmetric, n, k)
    stored = format_.stored(tensors, spec, scheme)
    assert isinstance(stored, quantkit_kernels.Stored)
    back = format_.from_stored(stored, scheme, {})
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[leaf], t) and back[leaf].dtype == t.dtype for leaf, t in tensors.items())


def test_no_other_room_writes_the_name_of_a_stored_tensor():
    leaves = {leaf for name in registry.names() for leaf in codec(name).leaves}
    leaves -= {"weight", "input_scale"}  # words that mean something elsewhere too
    found = []
    for file in sorted((ROOT / "quantkit").rglob("*.py")):
        if file.parent.name == "formats":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            name = node.attr if isinstance(node, ast.Attribute) else text
            found += [f"{file.relative_to(ROOT)}:{node.lineno}: {leaf}" for leaf in leaves if leaf in name]
    assert found == []
