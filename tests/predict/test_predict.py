"""What `validate` predicts against what runs have needed."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit import assets
from quantkit.models.headers import Headers, read_checkpoint
from quantkit.models.tensors import TensorInfo
from quantkit.plan import LayerPlan, build_plan
from quantkit.predict.sizes import PROCESS, packed_bytes, predict
from quantkit.recipe.recipe import load_recipe
from quantkit.scheme import PRESETS, Scheme, integer

RECORDS = Path(__file__).parents[2] / "docs" / "benchmarks"


def predicted(recipe, headers, *overrides):
    checked = load_recipe(recipe, overrides)
    return predict(checked, build_plan(checked, headers), headers)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "group"), [(7, 96, 32), (64, 128, None), (33, 192, 64)])
def test_a_packed_linear_has_the_predicted_bytes(bits, symmetric, n, k, group):
    import torch

    from quantkit.algorithms.rtn import rtn
    from quantkit.formats.compressed_tensors import CompressedTensors

    grid = integer(bits, group, symmetric)
    stored = CompressedTensors().pack(rtn(torch.randn(n, k), grid, torch.bfloat16))
    layer = LayerPlan("a", (n, k), False, 0, Scheme(grid), load_recipe("w4a16-rtn").weights.algorithm)
    assert packed_bytes(layer, 2) == sum(t.nbytes for t in stored.values())


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "NF4"])
def test_a_linear_of_every_preset_has_the_bytes_of_its_stored_shapes(preset):
    from quantkit.formats.compressed_tensors import CompressedTensors

    scheme, codec = PRESETS[preset], CompressedTensors()
    dtypes, shapes = codec.dtypes(scheme), codec.shapes(192, 256, scheme)
    wanted = sum((dtypes[leaf].itemsize if dtypes[leaf] else 2) * math.prod(shapes[leaf]) for leaf in shapes)
    layer = LayerPlan("a", (192, 256), False, 0, scheme, load_recipe("w4a16-rtn").weights.algorithm)
    assert packed_bytes(layer, 2) == wanted


# A process of its own: its peak memory counts from what it needed before the run.
_RUN = """
import resource, sys
from quantkit.pipeline.quantize import quantize
from quantkit import assets
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained(assets.default_model(), trust_remote_code=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantize(sys.argv[1], output=sys.argv[2], evaluate=False, device="cpu", overrides=sys.argv[3:])
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [("w4a16-rtn", []), ("w4a16-gptq", ["calibration.samples=16", "weights.algorithm.refine=0"])],
)
def test_a_run_of_the_embedded_model_needs_no_more_than_predicted(tmp_path, recipe, overrides):
    found = predicted(recipe, read_checkpoint(assets.default_model()), *overrides)
    command = [sys.executable, "-c", _RUN, recipe, str(tmp_path / "out"), *overrides]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) <= found.memory - PROCESS
    files = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert found.output == pytest.approx(files, rel=0.02)
    manifest = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert found.tensors == manifest["size"]["quantized_bytes"]
    assert found.disk >= files


@pytest.mark.slow
@pytest.mark.parametrize("length", [512, 64])
def test_an_evaluated_run_needs_no_more_than_predicted_and_not_much_less(tmp_path, length):
    """Logits of a batch of windows are most of what the small model takes."""
    code = (
        "import sys; from quantkit.pipeline.quantize import quantize;"
        "quantize('w4a16-rtn', output=sys.argv[1], device='cpu', eval_tokens=8192, overrides=sys.argv[2:])"
    )
    asked = f"calibration.sequence_length={length}"
    cache = os.environ | {
        "QUANTKIT_CACHE": str(tmp_path / "cache")
    }  # what was kept of the original saves logits
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out"), asked], check=True, env=cache)
    facts = json.loads((tmp_path / "out" / "quantkit.run.json").read_text())
    predicted, peak = facts["predicted_bytes"]["evaluate"], facts["peak_bytes"]["evaluate"]
    assert 0.7 * predicted <= peak <= predicted


def synthetic(layers=24, hidden=2048, intermediate=5504, vocabulary=8192, kv=None):
    """The headers of the model that docs/benchmarks/memory-*.json measured (quantkit.bench.synthetic).

    kv: rows of the keys' and values' linears, if they are fewer.
    """
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qo"}
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (kv or hidden, hidden) for p in "kv"}
        shapes |= {f"{at}.mlp.{p}_proj.weight": (intermediate, hidden) for p in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, intermediate)
    file = assets.default_model() / "model.safetensors"
    tensors = {n: TensorInfo(n, "BF16", s, file, 0, 2 * math.prod(s)) for n, s in shapes.items()}
    config = {"model_type": "llama", "hidden_size": hidden, "tie_word_embeddings": False}
    return Headers(assets.default_model(), config, tensors, [file])


MEASURED = [
    (row["run"], row["peak_anonymous_bytes"])
    for file in ("memory-rtn.json", "memory-gptq.json")
    for row in json.loads((RECORDS / file).read_text())["rows"]
]


@pytest.mark.parametrize(("run", "peak"), MEASURED)
def test_memory_is_an_upper_estimate_of_what_was_measured(run, peak):
    from quantkit.bench.models.memory import RUNS

    recipe, overrides, _ = RUNS[run]
    found = predicted(recipe, synthetic(), *overrides)
    assert peak <= found.memory <= 2 * peak


# Peak resident memory of `quantize` with RTN on one block of that shape, MB (docs/LOG.md, 2026-11-30).
ROUNDED = {
    "W4A16": 1389,
    "FP8_DYNAMIC": 1133,
    "NVFP4A16": 1802,
    "W8A8": 1270,
    "FP8_BLOCK": 1267,
    "MXFP4A16": 1173,
}


@pytest.mark.parametrize("preset", ROUNDED)
def test_rounding_needs_no_more_than_predicted_whatever_the_format(preset, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"weights: {{preset: {preset}, algorithm: rtn}}")
    found = predicted(str(recipe), synthetic(1, 4096, 14336, kv=1024))
    assert 1 <= found.memory / ROUNDED[preset] / 1e6 <= 1.35


def test_memory_does_not_grow_with_depth():
    shallow, deep = (predicted("w4a16-gptq", synthetic(layers)) for layers in (2, 40))
    assert shallow.memory == deep.memory
    assert shallow.output < deep.output


def test_everything_that_travels_is_in_the_predicted_size(tmp_path):
    shutil.copytree(assets.default_model(), tmp_path / "m")
    before = predicted("w4a16-rtn", read_checkpoint(tmp_path / "m"))
    (tmp_path / "m" / "additional_chat_templates").mkdir()
    (tmp_path / "m" / "additional_chat_templates" / "tool.jinja").write_bytes(bytes(5000))
    (tmp_path / "m" / "NOTICE").write_bytes(bytes(300))
    for name in ("modeling.py", "old.bin", "original/model.bin", "original/notes.txt"):
        (tmp_path / "m" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "m" / name).write_bytes(bytes(7000))  # stays behind
    after = predicted("w4a16-rtn", read_checkpoint(tmp_path / "m"))
    assert after.output - before.output == 5300
    assert after.disk - before.disk >= 5300


def test_prediction_needs_no_torch():
    code = (
        "import sys; from quantkit import assets; from quantkit.validation import validate;"
        "assert validate('w4a16-awq-gptq', str(assets.default_model())).prediction.memory > 10**8;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_bounds_are_those_of_the_code_they_stand_for():
    """The prediction does without torch, so it cannot import them."""
    from quantkit_eval import measure, windows

    from quantkit.algorithms import gptq
    from quantkit.calibration import divergence, replay, walk
    from quantkit.predict import block, memory, sizes

    assert (memory.KEPT, memory.SPARE) == (replay.KEPT_BYTES, replay.SPARE_BYTES)
    assert block.CHUNK == walk.CHUNK_ELEMENTS
    assert memory.LOGITS == divergence.LOGITS
    assert memory.ROWS == gptq.CHUNK_ELEMENTS
    assert (sizes.BATCH_TOKENS, sizes.BATCH_LOGITS) == (measure._BATCH_TOKENS, measure._BATCH_LOGITS)
    assert sizes.CHUNK_LOGITS == windows._CHUNK_LOGITS


def test_the_search_of_a_strength_needs_no_more_memory_than_gptq():
    """What is predicted for the embedded model. Measured peaks: `python -m quantkit.bench.quality.strength --cost`."""
    headers = read_checkpoint(assets.default_model())
    plus, gptq = (predicted(name, headers).memory for name in ("w4a16-smoothquant-plus", "w4a16-gptq"))
    assert plus <= gptq
