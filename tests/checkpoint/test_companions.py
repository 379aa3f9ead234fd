"""Which files travel beside the weights, how they are read, and what is refused."""

import os
from pathlib import Path

import pytest

from quantkit.checkpoint import companions
from quantkit.checkpoint.companions import copy_companions
from quantkit.errors import ModelError
from quantkit.models.companions import find_companions

TRAVEL = [
    "LICENSE", "NOTICE", "README.md", "USE_POLICY.md", "tekken.json", "tokenizer.json", "tokenizer.model", "vocab.txt",
    "generation_config.json", "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "figures/a.png",
]  # fmt: skip
STAY = [
    "config.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "modeling_x.py",
    ".gitattributes", "original/consolidated.00.pth", "original/params.json", "onnx/model.onnx", ".cache/x",
    "quantkit.json",
]  # fmt: skip


def folder_with(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def copied(model, output):
    output.mkdir()
    listed = copy_companions(find_companions(model), output)
    there = sorted(p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file())
    assert there == sorted(listed)
    return listed


def test_everything_travels_that_is_no_weight_code_or_written_anew(tmp_path):
    model = folder_with(tmp_path / "m", [*TRAVEL, *STAY])
    listed = copied(model, tmp_path / "o")
    assert sorted(listed) == sorted(TRAVEL)
    assert all((tmp_path / "o" / name).read_text() == name for name in TRAVEL)
    left = find_companions(model).left
    assert left["original/"] == left["onnx/"] == "it has weights of its own"
    assert "code" in left["modeling_x.py"]


def test_a_second_copy_in_a_subfolder_stays(tmp_path):
    model = folder_with(tmp_path / "m", ["tokenizer.json", "a/tokenizer.json", "b/tokenizer.json"])
    (model / "a/tokenizer.json").write_text("tokenizer.json")
    assert sorted(find_companions(model).files) == ["b/tokenizer.json", "tokenizer.json"]


def test_an_output_inside_the_model_is_not_its_own_companion(tmp_path):
    model = folder_with(tmp_path / "m", ["tokenizer.json", "out/tokenizer_config.json"])
    assert list(find_companions(model, model / "out").files) == ["tokenizer.json"]


@pytest.mark.parametrize("name", ["LICENSE", "vocab.txt", "x.model", "sub/x.json"])
def test_links_out_of_the_folder_are_refused_by_name(tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    model = folder_with(tmp_path / "m", ["tokenizer.json", "sub/y.json"])
    (model / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=f"{name} is a symbolic link"):
        find_companions(model)


@pytest.mark.parametrize("name", [b"NOTICE\xe9", b"sub/caf\xe9.txt"])
def test_names_that_no_manifest_can_hold_are_refused(tmp_path, name):
    model = folder_with(tmp_path / "m", ["tokenizer.json", "sub/y.json"])
    (model / os.fsdecode(name)).write_text("x")
    with pytest.raises(ModelError, match="rename the file"):
        find_companions(model)


def test_links_of_folders_and_special_files_are_refused(tmp_path):
    model = folder_with(tmp_path / "m", ["tokenizer.json"])
    (model / "etc").symlink_to("/etc")
    with pytest.raises(ModelError, match="etc is a symbolic link"):
        find_companions(model)
    (model / "etc").unlink()
    os.mkfifo(model / "pipe.json")
    with pytest.raises(ModelError, match=r"pipe.json is no regular file"):
        find_companions(model)


def test_links_inside_the_folder_and_into_the_cache_of_the_hub_are_read(tmp_path):
    repository = tmp_path / "models--a--b"
    model = folder_with(repository / "snapshots/0123", ["tokenizer.json"])
    folder_with(repository / "blobs", ["77"])
    (model / "LICENSE").symlink_to("../../blobs/77")
    (model / "COPYING").symlink_to("tokenizer.json")
    copied(model, tmp_path / "o")
    assert (tmp_path / "o/LICENSE").read_text() == "77"
    assert not (tmp_path / "o/LICENSE").is_symlink()
    assert (tmp_path / "o/COPYING").read_text() == "tokenizer.json"
    other = folder_with(tmp_path / "models--a--c/snapshots/0123", ["tokenizer.json"])
    (other / "LICENSE").symlink_to(repository / "blobs/77")
    with pytest.raises(ModelError, match="LICENSE is a symbolic link"):
        find_companions(other)


@pytest.mark.parametrize(
    ("had", "gets"), [(0o600, 0o600), (0o644, 0o644), (0o666, 0o644), (0o755, 0o644), (0o400, 0o400)]
)
def test_permissions_are_at_most_those_of_the_source(tmp_path, had, gets):
    model = folder_with(tmp_path / "m", ["tokenizer.json"])
    (model / "tokenizer.json").chmod(had)
    (tmp_path / "o").mkdir()
    (tmp_path / "o/tokenizer.json.tmp").write_text("left by a kill")
    before = os.umask(0)
    try:
        copy_companions(find_companions(model), tmp_path / "o")
    finally:
        os.umask(before)
    assert (tmp_path / "o/tokenizer.json").stat().st_mode & 0o777 == gets


def test_files_are_read_in_pieces(tmp_path, monkeypatch):
    model = folder_with(tmp_path / "m", ["tokenizer.json"])
    (model / "tokenizer.json").write_bytes(bytes(range(256)) * 10)
    monkeypatch.setattr(companions, "_PIECE", 100)
    read = []
    pieces = companions._pieces
    monkeypatch.setattr(companions, "_pieces", lambda each: (read.append(len(p)) or p for p in pieces(each)))
    copied(model, tmp_path / "o")
    assert max(read) <= 100
    assert (tmp_path / "o/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_a_link_in_the_output_leads_nowhere(tmp_path):
    model = folder_with(tmp_path / "m", ["sub/x.json"])
    (tmp_path / "o").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "o/sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="symbolic link"):
        copy_companions(find_companions(model), tmp_path / "o")
    assert list(Path(tmp_path / "elsewhere").iterdir()) == []
