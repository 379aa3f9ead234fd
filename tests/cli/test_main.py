import errno
import json
import subprocess
import sys
import tempfile

import pytest
from click.testing import CliRunner
from quantkit_eval.errors import BrokenModel, EvalError

from quantkit import assets, errors
from quantkit.cli import quantize as quantize_verb
from quantkit.cli.main import run
from quantkit.cli.verbs import cli

HEAVY = ("torch", "transformers", "numpy", "datasets", "accelerate")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["recipes"],
        ["validate", "w4a16-gptq"],
        ["validate", "w4a16-gptq", "--model", str(assets.default_model())],
        *(
            [verb, "--help"]
            for verb in ("quantize", "eval", "generate", "inspect", "validate", "diff", "verify")
        ),
        ["calibration", "--help"],
    ],
    ids=" ".join,
)
def test_answers_at_once_without_torch(arguments):
    code = (
        "import sys; from quantkit.cli.main import run; code = run(sys.argv[1:]); "
        f"loaded = [m for m in {HEAVY} if m in sys.modules]; print(loaded, file=sys.stderr); "
        "sys.exit(code or bool(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_importing_quantkit_is_inert():
    code = f"import sys, quantkit; sys.exit(any(m in sys.modules for m in {HEAVY}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_verbs_are_those_of_the_readme():
    assert set(cli.commands) == {
        "quantize",
        "eval",
        "generate",
        "inspect",
        "validate",
        "plan",
        "sweep",
        "report",
        "recipes",
        "kernels",
        "bench",
        "calibration",
        "diff",
        "verify",
    }


def test_recipes_lists_every_recipe_with_its_line(capsys):
    assert run(["recipes"]) == 0
    lines = capsys.readouterr().out
    assert all(name in lines for name in assets.recipe_names())
    assert "GPTQ: 4-bit weights, groups of 128" in lines


def test_validate_shows_defaults_and_plan(capsys):
    assert (
        run(
            [
                "validate",
                "w3a16-rtn",
                "--set",
                "weights.group_size=64",
                "--model",
                str(assets.default_model()),
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "group_size: 64" in shown
    assert "model.layers.7.mlp.down_proj" in shown
    assert "W3A16 g64 sym" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate", "w4a16-gptq", "--set", "weights.bits=9"], "--set weights.bits=9: weights.bits"),
        (["validate", "nope"], "w4a16-gptq"),
        (["validate", "w4a16-gptq", "--model", "/nonexistent/model"], "/nonexistent/model"),
        (["validate"], "RECIPE"),
        (["quantise"], "quantize"),
        (["quantize", "w4a16-gptq", "--json", "/nonexistent/folder/x.json"], "existing folder"),
        (["generate", "m", "--prompt", "x", "--max-new-tokens", "0"], "max-new-tokens"),
    ],
)
def test_wrong_input_is_exit_code_2_and_no_traceback(arguments, message, capsys):
    assert run(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NumericalError("layer x"), 1),
        (errors.VerificationError("shard x"), 1),
        (errors.OutputError("disk full"), 2),
        (EvalError("too little text"), 2),
        (BrokenModel("non-finite logits"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_code_of_a_failed_run(monkeypatch, capsys, error, code):
    def fail():
        raise error

    monkeypatch.setattr(quantize_verb, "make_progress", fail)
    assert run(["quantize", "w4a16-gptq"]) == code
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert (str(error) or "interrupted") in told


def test_a_bug_is_named_and_its_traceback_kept(monkeypatch, capsys, tmp_path):
    def fail():
        raise ValueError("a bug")

    monkeypatch.setattr(quantize_verb, "make_progress", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run(["quantize", "w4a16-gptq"]) == 1
    told = capsys.readouterr().err
    assert "unexpected ValueError: a bug" in told
    assert "Traceback" not in told
    (kept,) = tmp_path.iterdir()
    assert str(kept) in told
    assert "in fail" in kept.read_text()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"),
    ],
    ids=repr,
)
def test_no_memory_is_said_whatever_was_made_of_it(monkeypatch, capsys, error):
    def fail():
        raise error

    def fail_in_a_net():
        try:
            fail()
        except Exception:
            raise errors.ModelError("config.json cannot be read") from None

    for failing in (fail, fail_in_a_net):
        monkeypatch.setattr(quantize_verb, "make_progress", failing)
        assert run(["quantize", "w4a16-gptq"]) == 1
        assert "out of memory" in capsys.readouterr().err
        with pytest.raises(errors.OutOfMemory, match="out of memory"):
            errors.memory_named()(failing)()


def test_other_errors_are_not_taken_for_missing_memory():
    with pytest.raises(errors.ModelError, match="no such"):
        errors.memory_named()(lambda: (_ for _ in ()).throw(errors.ModelError("no such model")))()


def test_every_verb_shows_its_whole_first_sentence():
    shown = " ".join(CliRunner().invoke(cli, ["--help"]).output.split())
    for verb in cli.commands.values():
        sentence = " ".join(verb.help.partition("\n\n")[0].split())
        assert sentence.endswith(".")
        assert sentence in shown
    assert "..." not in shown.partition("Commands")[2]


def test_inspect_of_a_plain_checkpoint(capsys, tmp_path):
    file = tmp_path / "report.json"
    assert run(["inspect", str(assets.default_model()), "--json", str(file), "--device", "cpu"]) == 0
    report = json.loads(file.read_text())
    assert report["schema"] == "quantkit-inspect/1"
    assert report["totals"]["quantized_layers"] == 0
    assert report["totals"]["model_bits_per_weight"] == 16
    assert "float32 on cpu: 33.57 MB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["bench", "--products", "--batch", "4", "--way", "native"], "--batch and --way cannot be combined"),
        (["bench", "some", "--shapes", "1.1b"], "--shapes cannot be combined with a model"),
        (["eval", "some", "--run-in", "native"], "--run-in cannot be combined with an evaluation on text"),
        (["eval", "some", "--long", "5", "--batch-size", "2"], "--batch-size cannot be combined with --long"),
        (["sweep", "--methods", "rtn", "--report", "/no/such/folder/x.html"], "/no/such/folder"),
    ],
)
def test_options_that_would_do_nothing_are_refused(command, said):
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
