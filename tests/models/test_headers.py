"""Every way a checkpoint folder can be wrong that its config and headers show."""

import json
import struct
import subprocess
import sys

import pytest

from quantkit import assets
from quantkit.errors import ModelError
from quantkit.models.blocks import find_blocks
from quantkit.models.headers import read_checkpoint, resolve_model

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
NAME = "model.layers.0.mlp.up_proj.weight"


def entry(shape, begin, dtype="F32", width=4):
    size = width
    for n in shape:
        size *= n
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}


def write(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


@pytest.fixture
def folder(tmp_path):
    """A good checkpoint of two tensors."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write(
        tmp_path / "model.safetensors", {NAME: entry([2, 3], 0), "lm_head.weight": entry([2], 24)}, bytes(32)
    )
    return tmp_path


def config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def refused(folder, *fragments):
    with pytest.raises(ModelError) as caught:
        read_checkpoint(folder)
    for fragment in fragments:
        assert fragment in str(caught.value)


def shard(folder, weight_map, **files):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for stem, header in files.items():
        size = max(e["data_offsets"][1] for e in header.values())
        write(folder / f"{stem}.safetensors", header, bytes(size))


def test_offsets_are_absolute(folder):
    headers = read_checkpoint(folder)
    info = headers.tensors["lm_head.weight"]
    assert (info.shape, info.dtype, info.nbytes) == ((2,), "F32", 8)
    assert info.offset + info.nbytes == info.file.stat().st_size
    assert not headers.tied


def test_the_embedded_model_is_read_without_torch():
    code = (
        "import sys; from quantkit.models.headers import read_checkpoint; from quantkit import assets;"
        "h = read_checkpoint(assets.default_model()); assert len(h.tensors) == 74 and h.tied;"
        "assert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_metadata_and_empty_tensors_are_fine(folder):
    header = {"__metadata__": {"format": "pt"}, "a": entry([0, 4], 0), NAME: entry([2], 0)}
    write(folder / "model.safetensors", header, bytes(8))
    assert set(read_checkpoint(folder).tensors) == {"a", NAME}


@pytest.mark.parametrize("size", [0, 5, 8, 40])
def test_truncated_header(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(folder, "truncated")


def test_truncated_data_names_the_tensor(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    refused(folder, "truncated", "3 bytes", "lm_head.weight")


def test_trailing_bytes(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"xx")
    refused(folder, "2 bytes after")


def test_huge_header_length_is_not_allocated(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refused(folder, "truncated or no safetensors")


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000,
    ],
)
def test_bad_header_json(folder, raw):
    write(folder / "model.safetensors", raw)
    refused(folder, "model.safetensors", "corrupt")


@pytest.mark.parametrize(
    ("bad", "fragment"),
    [
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "shape"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "shape"),
        ({"dtype": "F32", "shape": "2", "data_offsets": [0, 4]}, "shape"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, "offsets"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "offsets"),
        ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}, "needs"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "needs 8 bytes"),
        ({"dtype": "F5", "shape": [1], "data_offsets": [0, 4]}, "unknown dtype"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "unknown dtype"),
        (7, "no description"),
    ],
)
def test_bad_entry_names_the_tensor(folder, bad, fragment):
    write(folder / "model.safetensors", {"evil": bad}, bytes(4))
    refused(folder, "evil", fragment)


@pytest.mark.parametrize(("begin", "word"), [(4, "overlaps"), (12, "hole")])
def test_data_must_be_contiguous(folder, begin, word):
    write(folder / "model.safetensors", {"a": entry([2], 0), "b": entry([2], begin)}, bytes(begin + 8))
    refused(folder, "b", word)


@pytest.mark.parametrize(("dtype", "width"), [("F8_E4M3", 1), ("I32", 4), ("F64", 8), ("U8", 1)])
def test_weight_dtypes(folder, dtype, width):
    write(folder / "model.safetensors", {NAME: entry([2], 0, dtype, width)}, bytes(2 * width))
    refused(folder, NAME, dtype, "BF16")


def test_dropped_tensors_may_have_any_dtype(folder):
    config(folder, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    header = {"h.0.attn.bias": entry([4], 0, "U8", 1), "h.0.attn.c_attn.weight": entry([1], 4)}
    write(folder / "model.safetensors", header, bytes(8))
    assert list(read_checkpoint(folder).dropped) == ["h.0.attn.bias"]


# sharded ------------------------------


def test_sharded(folder):
    shard(
        folder, {"a": "x.safetensors", "b": "y.safetensors"}, x={"a": entry([1], 0)}, y={"b": entry([2], 0)}
    )
    headers = read_checkpoint(folder)
    assert [f.name for f in headers.files] == ["x.safetensors", "y.safetensors"]
    assert headers.tensors["b"].file.name == "y.safetensors"


@pytest.mark.parametrize(
    "target", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "c:\\x", "a\0b", 3, None]
)
def test_index_may_not_leave_its_folder(folder, target):
    shard(folder, {"a": target})
    refused(folder, "outside its folder")


def test_symlinked_files_are_read(folder, tmp_path_factory):
    """The hub's cache is made of links."""
    blob = tmp_path_factory.mktemp("blobs") / "blob"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    assert NAME in read_checkpoint(folder).tensors


def test_index_names_a_missing_file(folder):
    shard(folder, {"a": "gone.safetensors"})
    refused(folder, "missing", "gone.safetensors")


def test_index_names_a_missing_tensor(folder):
    shard(folder, {"a": "x.safetensors", "lost": "x.safetensors"}, x={"a": entry([1], 0)})
    refused(folder, "lost")


def test_index_names_the_wrong_file(folder):
    shard(
        folder,
        {"a": "y.safetensors", "b": "y.safetensors", "c": "x.safetensors"},
        x={"a": entry([1], 0), "c": entry([1], 4)},
        y={"b": entry([1], 0)},
    )
    refused(folder, "not in their files: a")


def test_a_tensor_in_two_shards(folder):
    shard(
        folder, {"a": "x.safetensors", "b": "y.safetensors"}, x={"a": entry([1], 0)}, y={"a": entry([1], 0)}
    )
    refused(folder, "both in x.safetensors and in y.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', "{}"])
def test_corrupt_index(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "index.json", "corrupt")


# what kind of model ------------------------------


def test_no_folder(tmp_path):
    refused(tmp_path / "none", "no model folder")


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "config.json")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": 3}', "\ufeff"])
def test_bad_config(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


def test_huge_config_is_not_parsed(folder):
    with (folder / "config.json").open("wb") as file:
        file.truncate(11_000_000)
    refused(folder, "more than the 10000000 allowed")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("pytorch_model.bin", "save_pretrained"),
        ("model.gguf", "give the original checkpoint"),
        ("consolidated.safetensors", "as transformers saves them"),
    ],
)
def test_other_weight_files_are_refused_with_advice(folder, name, advice):
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, name, advice)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"quantization_config": {"quant_method": "hqq"}}, "already quantized by the method 'hqq' (HQQ)"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}, "remote code"),
        ({"text_config": {"model_type": "t5", "is_encoder_decoder": True}}, "(t5) is an encoder-decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        (
            {"model_type": "rwkv", "rescale_every": 6, "architectures": ["RwkvForCausalLM"]},
            "rescale_every: 0",
        ),
    ],
)
def test_refused_by_config(folder, changes, fragment):
    config(folder, **changes)
    refused(folder, fragment)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"n_layer": 3},
        {"hidden_size": 10**12},
        {"head_dim": 10**18},
        {"vision": {"hidden_size": 10**12}},
    ],
)
def test_numbers_no_checkpoint_can_have_are_refused_before_anything_is_built(folder, changes):
    config(folder, **changes)
    refused(folder, "config.json", str(next(iter(changes.values()))).strip("{}").split()[-1])


@pytest.mark.parametrize("value", [-1, 0, "x", 1.5, True])
@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions"])
def test_positions_must_be_a_positive_number(folder, key, value):
    config(folder, **{key: value})
    refused(folder, "config.json", key, repr(value))


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "some/kernel"},
        {"_attn_implementation": {"text_config": "some/kernel"}},
        {"text": {"experts_implementation": "some/kernel:fn"}},
    ],
)
def test_kernels_of_the_hub_are_refused(folder, changes):
    config(folder, **changes)
    refused(folder, "some/kernel", "never runs")


@pytest.mark.parametrize("architectures", [7, "LlamaForCausalLM", [7], {}])
def test_architectures_must_be_names(folder, architectures):
    config(folder, architectures=architectures)
    refused(folder, "architectures must be a list")


def test_an_adapter_is_called_one(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    refused(folder, "is an adapter of owner/base", "merge_and_unload")
    (folder / "config.json").unlink()
    refused(folder, "is an adapter of owner/base")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 1},
        {"num_experts": 0},
        {"quantization_config": None},
        {"auto_map": {"AutoConfig": "x.Y"}},
        {"architectures": None},
        {"vision_config": None},
    ],
)
def test_accepted_by_config(folder, changes):
    config(folder, **changes)
    read_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "already quantized"),
        ("model.layers.0.mlp.up_proj.weight_scale", "already quantized"),
    ],
)
def test_refused_by_tensor_names(folder, name, fragment):
    write(folder / "model.safetensors", {name: entry([1], 0)}, bytes(4))
    refused(folder, fragment, name)


def test_no_weights(folder):
    write(folder / "model.safetensors", {})
    refused(folder, "no weights")


@pytest.mark.parametrize(
    ("changes", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": None}, False),
        ({"tie_word_embeddings": None, "model_type": "gpt2"}, True),
        ({"tie_word_embeddings": None, "model_type": "unlisted"}, False),
        ({"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": True}}, True),
    ],
)
def test_tied(folder, changes, tied):
    config(folder, **changes)
    assert read_checkpoint(folder).tied is tied


# where a model is ------------------------------


def test_resolve_local_and_default(folder, tmp_path):
    assert resolve_model(None, assets.default_model()) == assets.default_model()
    assert resolve_model(str(folder), assets.default_model()) == folder


@pytest.mark.parametrize("name", ["./no/such", "a/b/c", "no such", "x/../y"])
def test_resolve_refuses_what_is_neither_folder_nor_id(name):
    with pytest.raises(ModelError, match="no folder"):
        resolve_model(name, assets.default_model())


def test_resolve_refuses_a_file(folder):
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(folder / "config.json", assets.default_model())


@pytest.mark.parametrize("error", [OSError("no route to host"), ValueError("odd")])
def test_unreachable_hub(monkeypatch, error):
    import huggingface_hub

    def unreachable(repo, revision, allow_patterns, ignore_patterns):
        assert (repo, revision) == ("owner/name", "v1")
        assert not any("bin" in pattern for pattern in allow_patterns)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelError, match=f"owner/name@v1.*{error}.*local folder"):
        resolve_model("owner/name@v1", assets.default_model())


# names and paths ------------------------------


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("my-model", "my-model"),
        ("models--acme--tiny/snapshots/0123abcd", "acme/tiny"),
        ("models--gpt2/snapshots/0123abcd", "gpt2"),
        ("snapshots/0123abcd", "0123abcd"),
    ],
)
def test_a_folder_of_the_cache_is_called_by_its_repository(folder, tmp_path_factory, where, name):
    path = tmp_path_factory.mktemp("hub") / where
    path.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(path)
    assert read_checkpoint(path).name == name


@pytest.mark.parametrize(
    "path", ["a\0b", "x" * 5000, "x" * 300 + "/y", "~nosuchuser/model", "a\udce9", "a/b/c/d"]
)
def test_paths_that_cannot_be_are_told(path):
    with pytest.raises(ModelError) as caught:
        resolve_model(path, assets.default_model())
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("listed", ["model.layers", "vision.blocks"])
def test_a_number_of_thousands_of_digits_counts_no_blocks(folder, listed):
    """Python refuses to read such a number: the name is then that of any other tensor."""
    name = f"{listed}.{'9' * 5000}.up_proj.weight"
    header = {NAME: entry([2, 3], 0), name: entry([2], 24)}
    write(folder / "model.safetensors", header, bytes(32))
    found = read_checkpoint(folder)
    assert find_blocks(folder, found.config, found.tensors).of == {NAME: 0}
