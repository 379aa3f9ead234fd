"""`quantkit generate`: on the native path where there is one, with an error for a path that cannot run."""

import io
import os
import subprocess
import sys

import pytest
import tiny_models
from quantkit_eval import generate_stream
from quantkit_kernels.cpu import library

from quantkit import assets
from quantkit.checkpoint import load as loading
from quantkit.cli.main import run

NATIVE = pytest.mark.skipif(not library.available(), reason="the native library is not built")
PROMPT = ["generate", str(assets.default_model()), "--prompt", "The king", "--max-new-tokens", "4"]


@NATIVE
def test_a_llama_runs_natively(capsys):
    assert run([*PROMPT, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "in transformers" not in captured.err
    assert "decode native: 4 tokens" in captured.err


@NATIVE
def test_int8_needs_packed_linears(capsys):
    assert run([*PROMPT, "--compute", "int8"]) == 2
    assert "no packed linears" in capsys.readouterr().err


@NATIVE
def test_an_instruction_set_that_is_missing_is_an_error():
    missing = next(
        (name for i, name in enumerate(library.ISAS) if not library.load().qk_isa_available(i)), None
    )
    if missing is None:
        pytest.skip("this machine has them all")
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", *PROMPT],
        env=os.environ | {"QUANTKIT_ISA": missing, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"QUANTKIT_ISA='{missing}' cannot run on this CPU" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.filterwarnings("default:the native CPU kernels are not built")
def test_missing_native_kernels_are_one_line_of_messages(monkeypatch, capsys, tmp_path):
    model = tiny_models.save(tiny_models.FAMILIES["llama"](), tmp_path / "m")
    recipe = ["w4a16-rtn", "--set", "weights.group_size=32", "--no-eval", "--device", "cpu"]
    assert run(["quantize", *recipe, "--model", str(model), "--output", str(tmp_path / "q")]) == 0
    capsys.readouterr()
    monkeypatch.delenv("QUANTKIT_BACKEND")
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(loading, "_hinted", False)
    for _ in range(2):
        assert (
            run(
                ["generate", str(tmp_path / "q"), "--device", "cpu", "--prompt", "a", "--max-new-tokens", "2"]
            )
            == 0
        )
    said = capsys.readouterr().err
    assert (
        said.count("warning: the native CPU kernels are not built, so decode on the CPU is about 15 times")
        == 1
    )
    assert "UserWarning" not in said


SHORT = ["--device", "cpu", "--max-new-tokens", "8"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@NATIVE
def test_several_prompts_give_what_each_gives_alone(tmp_path, capsys):
    texts = ["It was", "The king said to his men that", "A"]
    model = str(assets.default_model())
    (tmp_path / "long.txt").write_bytes(f"{texts[1]}\r\n".encode())
    sampled = [*SHORT, "--temperature", "0.8"]
    alone = []
    for number, text in enumerate(texts):
        assert run(["generate", model, "--prompt", text, *sampled, "--seed", str(5 + number)]) == 0
        alone.append(capsys.readouterr().out)
    given = ["--prompt", texts[0], "--prompt", texts[2], "--prompt-file", str(tmp_path / "long.txt")]
    assert run(["generate", model, *given, *sampled, "--seed", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"[1] {texts[0]}\n{alone[0]}\n[2] A\n")
    assert f"[3] {texts[1]}\n" in captured.out
    assert "decode of 3 prompts together native: 24 tokens" in captured.err
    ordered = [*given[:2], "--prompt-file", str(tmp_path / "long.txt"), "--prompt-file", str(tmp_path / "a")]
    (tmp_path / "a").write_text("A")
    assert run(["generate", model, *ordered, *sampled, "--seed", "5"]) == 0
    shown = capsys.readouterr().out
    assert shown == "".join(f"[{i}] {text}\n{alone[i - 1]}\n" for i, text in enumerate(texts, 1))


def test_a_chat_is_rendered_by_the_template_of_the_tokenizer(tmp_path, capsys):
    model = tiny_models.save(tiny_models.FAMILIES["llama"](), tmp_path / "m")
    asked = ["generate", str(model), "--prompt", "hello", *SHORT]
    assert run([*asked, "--chat"]) == 2
    assert "has no chat template; leave --chat out" in capsys.readouterr().err
    (model / "chat_template.jinja").write_text(TEMPLATE)
    said = ["--chat", "--system", "be brief"]
    assert run([*asked, *said]) == 0
    rendered = capsys.readouterr().out
    plain = ["generate", str(model), "--prompt", "<system>be brief<user>hello<assistant>", *SHORT]
    assert run(plain) == 0
    assert capsys.readouterr().out == rendered  # this tokenizer adds no special tokens
    assert run(asked) == 0
    assert capsys.readouterr().out != rendered
    (model / "chat_template.jinja").write_text("{{ raise_exception('only poems') }}")
    assert run([*asked, "--chat"]) == 2
    assert "the chat template refuses these messages: only poems" in capsys.readouterr().err


def test_a_rendered_chat_gets_no_second_bos():
    from tokenizers.processors import TemplateProcessing

    tokenizer, model = tiny_models.tokenizer(), tiny_models.FAMILIES["llama"]()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    counts = [
        generate_stream(model, tokenizer, "hello", 1, special=special).prompt_tokens
        for special in (True, False)
    ]
    assert counts[0] == counts[1] + 1


def test_prompts_come_from_standard_input_and_what_is_none_is_an_error(tmp_path, monkeypatch, capsys):
    model = str(assets.default_model())
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for wrong, message in (
        ([], "there is no prompt; add --prompt TEXT or --prompt-file FILE"),
        (["--prompt", "a", "--system", "b"], "add --chat"),
        (["--prompt-file", str(tmp_path / "nothing")], "cannot read the prompt in"),
        (["--prompt-file", str(tmp_path / "latin")], "cannot read the prompt in"),
        (["--prompt", "a", "--prompt", ""], "prompt 2: the prompt has no tokens"),
    ):
        assert run(["generate", model, *SHORT, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert run(["generate", model, *SHORT, "--prompt", "It was"]) == 0
    wanted = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\ufeffIt was\n".encode())))
    assert run(["generate", model, *SHORT, "--prompt-file", "-"]) == 0
    assert capsys.readouterr().out == wanted
