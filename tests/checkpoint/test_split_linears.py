"""A linear on disk that is several in the model (Molmo 2): quantized, named and stored as on disk, cut when loaded."""

from types import SimpleNamespace

import pytest
import torch

import quantkit
from quantkit.bench.coverage_case import RECIPES, relative
from quantkit.bench.coverage_model import built, logits, tokenizer
from quantkit.checkpoint.split import cut
from quantkit.errors import BackendError, ModelError
from quantkit.layers.quant_linear import QuantLinear
from quantkit.models.tensors import read_tensors
from quantkit.numerics.weight import QuantizedWeight
from quantkit.pipeline.block import linears_of
from quantkit.pipeline.in_memory import quantize_in_memory
from quantkit.scheme import integer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a tiny Molmo 2, what it becomes by AWQ with zero points)."""
    folder = tmp_path_factory.mktemp("molmo")
    model, _ = built("molmo2", "Molmo2ForConditionalGeneration")
    model.save_pretrained(folder / "source")
    tokenizer().save_pretrained(folder / "source")
    quantkit.quantize(RECIPES["w4-awq"], folder / "source", folder / "packed", evaluate=False, device="cpu")
    return folder / "source", folder / "packed"


def test_a_split_linear_is_one_packed_linear_on_disk(folders):
    layer = "model.transformer.blocks.0."
    names = {
        n.removeprefix(layer).rpartition(".")[0] for n in read_tensors(folders[1])[1] if n.endswith("_packed")
    }
    assert {"self_attn.att_proj", "mlp.ff_proj"} <= names
    manifest = quantkit.quantize(RECIPES["w4-awq"], *folders, evaluate=False, device="cpu").manifest
    assert f"{layer}self_attn.att_proj" in {record.name for record in manifest.layers}


def test_its_parts_run_in_the_model(folders):
    loaded = quantkit.load(folders[1], device="cpu")
    attention = loaded.model.language_model.layers[0].self_attn
    assert all(
        isinstance(part, QuantLinear) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    wanted = logits(quantkit.load(folders[0], device="cpu"), {})
    assert relative(logits(loaded, {}), wanted) < 0.4
    in_memory = quantize_in_memory(RECIPES["w4-awq"], folders[0], device="cpu")
    assert torch.allclose(logits(in_memory, {}), logits(loaded, {}), atol=1e-4)
    with pytest.raises(BackendError, match="copy that folder"):
        loaded.save_pretrained(folders[0].parent / "again")


@pytest.mark.parametrize("sizes", [(64, 32, 32), (12, 20, 7)], ids=["whole words", "within words"])
def test_the_tensors_of_a_packed_weight_are_cut_by_rows(sizes):
    rows, columns, grid = sum(sizes), 32, integer(4, 16, False)
    generator = torch.Generator().manual_seed(0)

    def drawn(shape):
        return torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)

    scale = torch.rand(rows, 2, generator=generator)
    weight = QuantizedWeight(drawn((rows, columns)), scale, drawn((rows, 2)), grid)
    whole = QuantLinear.from_quantized(weight, None)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [weight.rows(slice(a, a + n)) for a, n in zip(starts, sizes, strict=True)]
    wanted = [QuantLinear.from_quantized(part, None) for part in parts]
    for leaf, tensor in whole.leaves.items():
        for found, linear in zip(cut("w", leaf, tensor, wanted), wanted, strict=True):
            assert torch.equal(found, linear.leaves[leaf]), leaf
    with pytest.raises(ModelError, match="cannot be cut into parts"):
        cut("w", "weight_packed", whole.leaves["weight_packed"][1:], wanted)


def test_parts_are_worked_on_in_the_order_of_their_rows_and_only_together():
    plan = SimpleNamespace(name="qkv", split=("block.q", "block.k"))
    run = SimpleNamespace(
        plans={"q": plan, "k": plan, "o": SimpleNamespace(name="o", split=())}, name="block"
    )
    assert linears_of(run, ["k", "o", "q"]) == [["q", "k"], ["o"]]
    with pytest.raises(ModelError, match="qkv is 2 linears in the model, which do not read the same input"):
        linears_of(run, ["k", "o"])
