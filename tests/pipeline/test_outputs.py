"""What may stand in the output folder, what is refused there, and that every verification can fail."""

import errno
import json
import random
import resource
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import interrupt
import numpy as np
import pytest
import quantkit_kernels
import tiny_models
import torch
from quantkit_eval import Fit, Report
from safetensors.torch import load_file, save_file

import quantkit
import quantkit.pipeline.evaluation
from quantkit.algorithms.registry import ALGORITHMS
from quantkit.checkpoint.manifest import read_manifest
from quantkit.checkpoint.shards import write_shard
from quantkit.checkpoint.verify import verify_checkpoint
from quantkit.cli.main import run
from quantkit.errors import ModelError, NumericalError, OutputError, VerificationError
from quantkit.layers.quant_linear import QuantLinear
from quantkit.pipeline import shard_writer
from quantkit.pipeline.run import Run

pytestmark = pytest.mark.usefixtures("steady")

SHARD = "model-{:05d}-of-00005.safetensors".format
INDEX = "model.safetensors.index.json"


def files(folder):
    """Contents of everything in the folder but the one file that may differ."""
    kept = (f for f in Path(folder).rglob("*") if f.is_file() and f.name != "quantkit.run.json")
    return {str(f.relative_to(folder)): f.read_bytes() for f in kept}


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """finished(recipe name) -> folder of a finished run; not to be changed."""
    known = {}

    def make(name):
        if name not in known:
            known[name] = tmp_path_factory.mktemp("finished") / "out"
            quantkit.quantize(**arguments(name, known[name]))
        return known[name]

    return make


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the finished RTN checkpoint, to be changed."""
    folder = tmp_path / "out"
    folder.mkdir()
    for file in finished("rtn").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def command(arguments, tmp_path, capsys):
    """command(recipe name, output, *options) -> (exit code, all that was printed)."""

    def call(name, output, *options, **changes):
        given = arguments(name, output, **changes)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(json.dumps(given["recipe"]))
        line = ["quantize", str(recipe), "--model", given["model"], "--output", str(output), "--no-eval"]
        code = run([*line, *options])
        said = capsys.readouterr()
        return code, " ".join((said.out + said.err).split())

    return call


def tensor_bytes(file, name):
    """(start, end) of a tensor inside a safetensors file."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    return tuple(8 + length + offset for offset in header[name]["data_offsets"])


def flip(file, at):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


# whose folder it is ------------------------------------------------------------------------------------------


def other_model(inputs, folder):
    model = tiny_models.FAMILIES["llama-gqa"](num_hidden_layers=4)
    model.lm_head.weight[0, 0] += 1
    tiny_models.save(model, folder, dtype=torch.bfloat16)
    return folder


def test_another_run_is_refused_with_what_differs(command, finished, inputs, tmp_path):
    code, said = command("rtn", finished("rtn"), "--set", "weights.bits=3")
    assert code == 2
    assert "recipe.weights.bits: 4 -> 3" in said
    assert "--no-resume" in said
    assert "model:" not in said.partition("differs")[2]
    code, said = command("rtn", finished("rtn"), model=other_model(inputs, tmp_path / "other"))
    assert code == 2
    assert " model: " in said
    assert "recipe." not in said.partition("differs")[2]


@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_another_calibration_text_is_refused(command, arguments, finished, tmp_path, state):
    text = tmp_path / "text"
    original = Path(arguments("gptq", "")["recipe"]["calibration"]["data"][0]).read_text()
    text.write_text(original)
    calibration = {"data": [str(text)], "samples": 8, "sequence_length": 32}
    given = arguments("gptq", tmp_path / "out", calibration=calibration)
    if state == "finished":
        quantkit.quantize(**given)
    else:
        with fails_at("write", SHARD(2) + ".tmp", OSError(errno.ENOSPC, "full")), pytest.raises(OutputError):
            quantkit.quantize(**given)
    before = files(tmp_path / "out")
    text.write_text(original[::-1])
    code, said = command("gptq", tmp_path / "out", calibration=calibration)
    assert code == 2
    assert " data: " in said
    assert files(tmp_path / "out") == before


def test_no_resume_starts_over(command, arguments, finished, out, tmp_path):
    (out / "merges.txt").write_text("of the user")
    assert command("rtn", out, "--no-resume", "--set", "weights.bits=3")[0] == 0
    quantkit.quantize(**arguments("rtn", tmp_path / "fresh", weights={"algorithm": "rtn", "bits": 3} | SHAPE))
    assert files(out) == files(tmp_path / "fresh") | {"merges.txt": b"of the user"}


SHAPE = {"group_size": 32, "symmetric": False}


def test_starting_over_begins_with_the_manifest(arguments, out):
    """A folder that holds the manifest is finished, so it goes first."""
    with fails_at("unlink", "config.json", OSError(errno.EIO, "broken disk")), pytest.raises(OutputError):
        quantkit.quantize(**arguments("rtn", out), resume=False)
    assert (out / "config.json").exists()
    assert not (out / "quantkit.json").exists()


def test_foreign_files_are_left_alone(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    for options in ((), ("--no-resume",)):
        code, said = command("rtn", tmp_path / "out", *options)
        assert code == 2
        assert "not the output of a quantkit run" in said
        assert files(tmp_path / "out") == {"thesis.txt": b"years of work"}


def test_finished_output_is_verified_and_reported(command, arguments, finished):
    folder = finished("rtn")
    before = files(folder) | {"run": (folder / "quantkit.run.json").read_bytes()}
    code, said = command("rtn", folder)
    assert code == 0
    assert "finished" in said
    result = quantkit.quantize(**arguments("rtn", folder))
    assert result.manifest.to_json() == {
        k: v for k, v in json.loads(before["quantkit.json"]).items() if k != "sha256"
    }
    assert result.report.seconds["total"] == json.loads(before["run"])["seconds"]["total"]
    assert files(folder) | {"run": (folder / "quantkit.run.json").read_bytes()} == before


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("name", [SHARD(2), SHARD(5), "config.json", INDEX, "tokenizer.json"])
def test_damage_to_a_finished_output_is_found(command, out, name, damage):
    file = out / name
    if damage == "flip":
        flip(file, file.stat().st_size // 2)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    code, said = command("rtn", out)
    assert code == 1
    assert name in said
    assert "--no-resume" in said


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_manifest_is_found(command, finished, out, content):
    (out / "quantkit.json").write_text(content)
    code, said = command("rtn", out)
    assert code == 1
    assert "quantkit.json" in said
    assert command("rtn", out, "--no-resume")[0] == 0
    assert files(out) == files(finished("rtn"))


# a disk that refuses -----------------------------------------------------------------------------------------


@contextmanager
def fails_at(what, name, error):
    """Raise the error at one kind of moment."""

    def tick(*label):
        if label == (what, name):
            raise error

    with interrupt.watching(tick):
        yield


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("write", "journal.jsonl"),
        ("write", "journal.tmp"),
        ("fsync", SHARD(1) + ".tmp"),
        ("write", SHARD(3) + ".tmp"),
        ("rename", SHARD(3)),
        ("write", "streams-00002.safetensors.tmp"),
        ("fsync", "tokenizer.json.tmp"),
        ("write", INDEX + ".tmp"),
        ("write", "quantkit.json.tmp"),
    ],
)
def test_disk_full(arguments, finished, tmp_path, what, name):
    given = arguments("gptq", tmp_path / "out")
    full = OSError(errno.ENOSPC, "No space left on device")
    with fails_at(what, name, full), pytest.raises(OutputError, match="the disk is full") as caught:
        quantkit.quantize(**given)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out/quantkit.json").exists()
    assert not list((tmp_path / "out").glob("*.tmp"))
    quantkit.quantize(**given)
    assert files(tmp_path / "out") == files(finished("gptq"))


def test_the_kernel_refuses_to_write(command, finished, tmp_path):
    """A real refusal: no file may grow beyond 8 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        code, said = command("rtn", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 2
    assert "cannot write" in said
    assert "File too large" in said
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".quantkit"]
    assert command("rtn", tmp_path / "out")[0] == 0
    assert files(tmp_path / "out") == files(finished("rtn"))


@pytest.mark.parametrize("place", ["file", "file/out"])
def test_unwritable_output(command, tmp_path, place):
    (tmp_path / "file").write_text("not a folder")
    code, said = command("rtn", tmp_path / place)
    assert code == 2
    assert "cannot write" in said
    assert "choose another --output" in said


def test_read_only_output(command, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, said = command("rtn", tmp_path / "out")
    assert code == 2
    assert "make the folder writable" in said


# every verification can fail -------------------------------------------------------------------------------------


def assert_rejected(arguments, folder, error, match, name="rtn", **changes):
    """The run stops with this error, leaves nothing that looks finished, and its journal lacks the bad shard."""
    with pytest.raises(error, match=match):
        quantkit.quantize(**arguments(name, folder, **changes))
    assert not (folder / "quantkit.json").exists()


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"])
@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_a_flipped_bit_on_disk_is_found(arguments, finished, tmp_path, monkeypatch, name, leaf):
    layer = "model.layers.1.mlp.up_proj"

    def write_and_flip(path, tensors):
        written = write_shard(path, tensors)
        if f"{layer}.{leaf}" in tensors:
            flip(path, tensor_bytes(path, f"{layer}.{leaf}")[0])
        return written

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "write_shard", write_and_flip)
        match = layer if leaf == "weight_shape" else f"read back for {layer} is not what was written"
        assert_rejected(arguments, tmp_path / "out", VerificationError, match, name)
    assert not (tmp_path / "out/config.json").exists()
    quantkit.quantize(**arguments(name, tmp_path / "out"))
    assert files(tmp_path / "out") == files(finished(name))


def test_a_packed_forward_that_differs_is_found(arguments, tmp_path, monkeypatch):
    """The tensors of the file are run by the layer that `load` uses, on the backend it chooses."""
    ran = []
    forward = QuantLinear.forward

    def doubled(layer, x):
        ran.append(layer.backend)
        return 2 * forward(layer, x)

    monkeypatch.setattr(QuantLinear, "forward", doubled)
    assert_rejected(
        arguments,
        tmp_path / "out",
        VerificationError,
        r"layers\.0\..*: on backend .* the packed product differs",
    )
    spec = quantkit_kernels.Spec("int4", 4, 32, False, 64, 64)
    assert ran == [quantkit_kernels.select(spec, torch.device("cpu"), None, torch.float32)[0]]


def _lose_end(path):
    path.write_bytes(path.read_bytes()[:-5])


def _lose_tensor(path):
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("damage", [_lose_end, _lose_tensor, Path.unlink])
def test_a_damaged_shard_is_found(arguments, tmp_path, monkeypatch, damage):
    def write_and_damage(path, tensors):
        written = write_shard(path, tensors)
        if path.name == SHARD(2):
            damage(path)
        return written

    monkeypatch.setattr(shard_writer, "write_shard", write_and_damage)
    assert_rejected(arguments, tmp_path / "out", VerificationError, SHARD(2))


def test_a_flipped_bit_of_a_copied_tensor_is_found(arguments, tmp_path, monkeypatch):
    def write_and_flip(path, tensors):
        written = write_shard(path, tensors)
        if path.name == SHARD(5):
            flip(path, tensor_bytes(path, "model.embed_tokens.weight")[0])
        return written

    monkeypatch.setattr(shard_writer, "write_shard", write_and_flip)
    assert_rejected(arguments, tmp_path / "out", VerificationError, SHARD(5))


def test_a_lost_source_tensor_is_found(arguments, tmp_path, monkeypatch):
    parts = Run.parts.func

    def lossy(run):
        found = parts(run)
        found[1].pop("model.layers.1.input_layernorm.weight", None)
        return found

    monkeypatch.setattr(Run, "parts", property(lossy))
    assert_rejected(
        arguments, tmp_path / "out", VerificationError, r"account.*model.layers.1.input_layernorm.weight"
    )


def test_a_tensor_without_account_is_found(out):
    manifest = read_manifest(out)
    verify_checkpoint(out, manifest.files, manifest.tensors)
    del manifest.tensors["model.norm.weight"]
    with pytest.raises(VerificationError, match=r"without an account.*model\.norm\.weight"):
        verify_checkpoint(out, manifest.files, manifest.tensors)


def test_an_index_that_disagrees_with_the_shards_is_found(out):
    manifest = read_manifest(out)
    index = json.loads((out / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = SHARD(1)
    (out / INDEX).write_text(json.dumps(index))
    listed = {name: entry for name, entry in manifest.files.items() if name != INDEX}
    with pytest.raises(VerificationError, match=r"index and the shards disagree.*model\.norm\.weight"):
        verify_checkpoint(out, listed, manifest.tensors)


@pytest.mark.parametrize("name", ["rtn", "gptq"])
@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.post_attention_layernorm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_a_source_weight_that_is_not_finite_is_named(arguments, tmp_path, name, tensor):
    model = tiny_models.FAMILIES["llama-gqa"](num_hidden_layers=4)
    model.get_parameter(tensor).view(-1)[5] = float("inf") if "norm" in tensor else float("nan")
    tiny_models.save(model, tmp_path / "model", dtype=torch.bfloat16)
    match = f"{tensor} holds NaN or inf"
    assert_rejected(arguments, tmp_path / "out", ModelError, match, name, model=tmp_path / "model")
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_a_collapsed_layer_is_named(arguments, tmp_path, monkeypatch, name):
    """One of the linears that are quantized as one weight becomes zero; its siblings are sound."""
    real = ALGORITHMS[name]

    def quantize(weight, *rest):
        outcome = real.quantize(weight, *rest)
        marked = (weight[:, 0] == 2.0) & (weight[:, 1] == -2.0)
        outcome.weight.codes[marked] = outcome.weight.zero.repeat_interleave(32, 1)[marked]
        return outcome

    monkeypatch.setitem(ALGORITHMS, name, replace(real, quantize=quantize))
    layer = "model.layers.2.mlp.up_proj"
    model = tiny_models.FAMILIES["llama-gqa"](num_hidden_layers=4)
    weight = model.get_parameter(f"{layer}.weight")
    weight[:, 0], weight[:, 1] = 2.0, -2.0
    tiny_models.save(model, tmp_path / "model", dtype=torch.float16)
    match = rf"{layer}: collapsed"
    assert_rejected(arguments, tmp_path / "out", NumericalError, match, name, model=tmp_path / "model")


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_objectives_are_of_each_linear(arguments, tmp_path, name):
    """Siblings share an input and a solve, not an error: gate keeps its weights exactly, up cannot."""
    model = tiny_models.FAMILIES["llama-gqa"](num_hidden_layers=2)
    gate = model.get_parameter("model.layers.1.mlp.gate_proj.weight")
    gate.copy_(gate.sign())
    tiny_models.save(model, tmp_path / "model", dtype=torch.bfloat16)
    quantkit.quantize(**arguments(name, tmp_path / "out", model=tmp_path / "model"))
    layers = {one.name.rpartition(".")[2]: one for one in read_manifest(tmp_path / "out").layers}
    gate, up = layers["gate_proj"], layers["up_proj"]
    assert gate.relative_error != up.relative_error
    for one in (gate, up):
        assert 0 <= one.relative_error <= one.worst_row_error < 1


@pytest.mark.parametrize("name", ["rtn", "gptq"])
@pytest.mark.parametrize("std", [1e-4, 1e-5, 1e-6])
def test_small_weights_of_fp16_keep_their_bits(arguments, tmp_path, name, std):
    """Their scales are below fp16's smallest normal number, 6.1e-5."""
    model = tiny_models.FAMILIES["llama-gqa"](num_hidden_layers=1)
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * std)
    tiny_models.save(model, tmp_path / "model", dtype=torch.float16)
    quantkit.quantize(**arguments(name, tmp_path / "out", model=tmp_path / "model"))
    (up,) = (one for one in read_manifest(tmp_path / "out").layers if one.name.endswith("up_proj"))
    assert up.weight_error < 0.2
    assert up.worst_row_error < 0.2


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_a_layer_of_zeros_is_no_collapse(arguments, tmp_path, name):
    model = tiny_models.FAMILIES["llama-gqa"](num_hidden_layers=2)
    model.get_parameter("model.layers.1.mlp.down_proj.weight").zero_()
    tiny_models.save(model, tmp_path / "model", dtype=torch.bfloat16)
    quantkit.quantize(**arguments(name, tmp_path / "out", model=tmp_path / "model"))


def test_a_computed_tensor_that_is_not_finite_is_named(tmp_path):
    with pytest.raises(NumericalError, match=r"shard: some\.scale became NaN or infinite"):
        write_shard(tmp_path / "shard", {"some.scale": torch.tensor([1.0, float("inf")])})
    assert not list(tmp_path.iterdir())


# nothing but the inputs decides --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtn", "gptq", "awq"])
def test_random_state_is_neither_used_nor_changed(arguments, finished, tmp_path, name):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002  (the global one is meant)
    torch.manual_seed(12345)
    random.seed(12345)
    np.random.seed(12345)  # noqa: NPY002
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    try:
        quantkit.quantize(**arguments(name, tmp_path / "out"))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])  # noqa: NPY002
    assert files(tmp_path / "out") == files(finished(name))


def test_two_threads_give_the_bytes_of_one_without_calibration(arguments, finished, tmp_path):
    """With calibration they do not: BLAS adds in another order (docs/LOG.md has numbers)."""
    wanted = files(finished("rtn"))
    torch.set_num_threads(2)
    try:
        quantkit.quantize(**arguments("rtn", tmp_path / "out"))
    finally:
        torch.set_num_threads(1)
    assert files(tmp_path / "out") == wanted


def test_evaluation_left_out_at_first_is_made_up_for(out, arguments, monkeypatch):
    measured = Report(9, 1, 9, 9, ["text"], "", Fit(1.0, None, 0.0, None), max_tokens=65536)
    seen = []

    def evaluate_pair(output, *rest, **options):
        seen.append(output)
        return measured, []

    monkeypatch.setattr("quantkit.pipeline.quantize.evaluate_pair", evaluate_pair)
    again = arguments("rtn", out) | {"evaluate": True}
    assert quantkit.quantize(**again).report.evaluation == measured
    assert read_manifest(out).evaluation == measured
    assert quantkit.quantize(**again).report.evaluation == measured
    assert len(seen) == 1


def test_run_is_evaluated_with_the_packed_weights(arguments, tmp_path, monkeypatch):
    """The embedded text through a tiny model: the numbers of `quantize` are those of `quantkit_eval`."""
    import quantkit_eval
    from transformers import AutoTokenizer

    given = arguments("rtn", tmp_path / "out")
    text = tmp_path / "text"
    text.write_text(Path(quantkit.pipeline.evaluation.assets.evaluation_text()).read_text()[:3000])
    monkeypatch.setattr("quantkit.pipeline.evaluation.assets.evaluation_text", lambda: text)
    report = quantkit.quantize(**(given | {"evaluate": True})).report.evaluation
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    loaded = quantkit.load(tmp_path / "out", device="cpu")
    original = quantkit.load(given["model"], device="cpu")
    direct = quantkit_eval.evaluate(
        loaded, tokenizer, text, baseline=original, context=report.context, max_tokens=65536, kl_error=0.02
    )
    assert report == direct
    assert report.kl_mean > 0
