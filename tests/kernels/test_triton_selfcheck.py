"""What "auto" does with kernels that are right, wrong, unsteady or do not run, on a device that is made up."""

import json
import threading
import warnings

import pytest
import quantkit_kernels
import torch
from quantkit_kernels import Spec
from quantkit_kernels.reference.wna16_linear import dequantize as reference_dequantize
from quantkit_kernels.triton import layout, scaled_layout, scaled_op, scaled_selfcheck, selfcheck

from quantkit.cli.main import run

pytest.importorskip("triton")
CPU = torch.device("cpu")
SCHEME = (4, 128, True, 64, 256)


def spec_of(codes, zeros, bits, group_size, n, k):
    number = "fp8_e4m3" if codes.dtype == torch.float8_e4m3fn else f"int{bits}"
    return Spec(number, bits, group_size, zeros is None, n, k)


def right(x, codes, scales, zeros, bias, bits, group_size, n, k, config, y):
    stored = layout.restore(codes, scales, zeros, spec_of(codes, zeros, bits, group_size, n, k))
    truth = x.double() @ reference_dequantize(stored, torch.float64).T
    return y.copy_(truth if bias is None else truth + bias)


def right_weight(codes, scales, zeros, bits, group_size, n, k, dtype):
    stored = layout.restore(codes, scales, zeros, spec_of(codes, zeros, bits, group_size, n, k))
    return reference_dequantize(stored, dtype)


@pytest.fixture
def kernels(monkeypatch):
    """Kernels that are right; a test replaces one of them."""
    monkeypatch.setattr(selfcheck, "launch", right)
    monkeypatch.setattr(selfcheck, "dequantize", right_weight)
    return monkeypatch


def compare(number="int4", group=128, symmetric=True, even=True, dtype=torch.bfloat16):
    return selfcheck.compare(CPU, number, group, symmetric, even, dtype)


@pytest.mark.parametrize(
    ("number", "group", "symmetric", "even", "dtype"),
    [
        ("int2", 32, False, False, torch.bfloat16),
        ("int3", 0, False, False, torch.bfloat16),
        ("int4", 2048, True, True, torch.float16),
        ("int6", 96, True, True, torch.bfloat16),
        ("int8", 0, True, True, torch.float16),
        ("fp8_e4m3", 128, True, True, torch.bfloat16),
        ("fp8_e4m3", 0, True, False, torch.float16),
    ],
)
def test_what_is_right_passes_in_every_scheme(kernels, number, group, symmetric, even, dtype):
    assert compare(number, group, symmetric, even, dtype) is None


def test_a_case_of_each_kind_runs(kernels):
    seen = []

    def launch(x, codes, scales, zeros, bias, bits, group_size, n, k, config, y):
        seen.append((x.shape[0], config.bm, config.splits > 1, bias is not None, group_size, k))
        return right(x, codes, scales, zeros, bias, bits, group_size, n, k, config, y)

    kernels.setattr(selfcheck, "launch", launch)
    assert compare(even=False, group=32) is None
    assert len(seen) == 3 * selfcheck.REPEATS
    assert {case[:4] for case in seen} == {
        (1, 16, True, False),
        (16, 16, False, True),
        (70, 128, False, False),
    }
    assert {case[4:] for case in seen} == {(32, 1056)}


@pytest.mark.parametrize(("tokens", "factor"), [(1, 1.02), (16, 0.0), (70, torch.nan)])
def test_one_wrong_number_is_enough(kernels, tokens, factor):
    def launch(*arguments):
        y = right(*arguments)
        if len(y) == tokens:
            y[-1, -1] *= factor
        return y

    kernels.setattr(selfcheck, "launch", launch)
    assert f"int4 on {tokens} tokens is not what" in compare()


def test_a_bias_that_is_left_out_is_seen(kernels):
    kernels.setattr(selfcheck, "launch", lambda *a: right(*a[:4], None, *a[5:]))
    assert "16 tokens" in compare()


def test_an_output_that_is_not_written_is_seen(kernels):
    kernels.setattr(selfcheck, "launch", lambda *arguments: arguments[-1])
    assert compare() is not None


def test_a_weight_written_out_wrong_is_seen(kernels):
    kernels.setattr(selfcheck, "dequantize", lambda *arguments: -right_weight(*arguments))
    assert "written out" in compare()


def test_runs_that_differ_are_seen(kernels):
    runs = []

    def launch(*arguments):
        runs.append(right(*arguments))
        if len(runs) == selfcheck.REPEATS:
            runs[-1][0, 0] *= 1 + torch.finfo(torch.bfloat16).eps  # within what a sum may be off
        return runs[-1]

    kernels.setattr(selfcheck, "launch", launch)
    assert "two runs" in compare()


@pytest.fixture
def products(monkeypatch):
    """8-bit products that are right, on small weights; a test replaces them."""
    monkeypatch.setattr(scaled_selfcheck, "N", 40)
    monkeypatch.setattr(scaled_selfcheck, "K", 256)
    monkeypatch.setattr(scaled_selfcheck, "launch", right_product)
    return monkeypatch


def right_product(given, config, y):
    return y.copy_(scaled_op._twin(given))


@pytest.mark.parametrize("inputs", scaled_layout.NUMBERS)
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_that_are_right_pass(products, inputs, even, dtype):
    assert scaled_selfcheck.compare(CPU, inputs, even, dtype) is None


def without(*names):
    return lambda given, config, y: right_product(given._replace(**dict.fromkeys(names)), config, y)


def one_wrong(given, config, y):
    right_product(given, config, y)[-1, -1] *= 1.03
    return y


@pytest.mark.parametrize("inputs", scaled_layout.NUMBERS)
@pytest.mark.parametrize("wrong", [one_wrong, without("bias"), lambda *arguments: arguments[-1]])
def test_products_that_are_wrong_are_seen(products, inputs, wrong):
    products.setattr(scaled_selfcheck, "launch", wrong)
    assert "are not what the reference computes" in scaled_selfcheck.compare(CPU, inputs, True, torch.float16)


def test_a_stored_range_that_is_left_out_is_seen(products):
    for inputs, names in (("int8-range", ("x_zero", "sums")), ("fp8-range", ("x_scale",))):
        products.setattr(scaled_selfcheck, "launch", without(*names))
        assert "of a stored range" in scaled_selfcheck.compare(CPU, inputs, True, torch.bfloat16)


def test_products_that_differ_from_run_to_run_are_seen(products):
    runs = []

    def launch(*arguments):
        runs.append(right_product(*arguments))
        if len(runs) == 2:
            runs[-1][0, 0] *= 1 + torch.finfo(torch.bfloat16).eps
        return runs[-1]

    products.setattr(scaled_selfcheck, "launch", launch)
    assert "two runs" in scaled_selfcheck.compare(CPU, "int8-range", True, torch.bfloat16)


@pytest.fixture
def gpu(monkeypatch):
    """A device that only `select` believes in; what `compare` was asked for there."""
    asked = []
    monkeypatch.delenv("QUANTKIT_BACKEND", raising=False)
    monkeypatch.setattr(selfcheck, "_found", {})
    monkeypatch.setattr(selfcheck, "_warned", set())
    for name, answer in (
        ("is_available", True),
        ("current_device", 1),
        ("is_current_stream_capturing", False),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    for part in (selfcheck, scaled_selfcheck):
        monkeypatch.setattr(part, "compare", lambda *scheme: asked.append(scheme))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return asked


def select(device="cuda", scheme=SCHEME, backend=None, dtype=torch.bfloat16):
    return quantkit_kernels.select(Spec.integer(*scheme), device, backend, dtype)


def test_auto_compares_once_per_device_and_scheme(gpu):
    first = select()
    assert first == ("triton", "agrees with the reference on this device")
    assert gpu == [(torch.device("cuda", 1), "int4", 128, True, True, torch.bfloat16)]
    assert select("cuda:1") == select(torch.device("cuda:1"), (4, 128, True, 99, 1024)) == first
    assert len(gpu) == 1
    for device, scheme, dtype in (
        ("cuda:0", SCHEME, torch.bfloat16),
        ("cuda", SCHEME, torch.float16),
        ("cuda", (4, 128, False, 64, 256), torch.bfloat16),
        ("cuda", (8, 128, True, 64, 256), torch.bfloat16),
        ("cuda", (4, 64, True, 64, 256), torch.bfloat16),
        ("cuda", (4, 256, True, 64, 256), torch.bfloat16),
        ("cuda", (4, 100, True, 64, 100), torch.bfloat16),
    ):
        assert select(device, scheme, dtype=dtype).name == "triton"
    assert len(set(gpu)) == len(gpu) == 8


def test_auto_compares_8_bit_products(gpu):
    for number, inputs, group, found in (
        ("int8", "int8-range", 256, ("int8-range", True)),
        ("fp8_e4m3", "fp8-range", 100, ("fp8-range", False)),
        ("fp8_e4m3", "fp8-group", 128, ("fp8-group", True)),
    ):
        k = 256 if group == 128 else group
        spec = Spec(number, 8, group, True, 64, k, inputs)
        for _ in range(2):
            assert quantkit_kernels.select(spec, "cuda", None, torch.float16).name == "triton"
        assert gpu.pop() == (torch.device("cuda", 1), *found, torch.float16)
        assert gpu == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda *_: "4 bits are wrong", "4 bits are wrong"),
        (lambda *_: 1 / 0, "they fail on this device: ZeroDivisionError: division by zero"),
    ],
)
def test_auto_goes_on_to_the_reference_and_warns_once(gpu, monkeypatch, answer, reason):
    monkeypatch.setattr(selfcheck, "compare", answer)
    with pytest.warns(UserWarning, match=f"not used on cuda:1: {reason}"):
        found = select()
    assert found.name == "reference"
    assert f"not triton: {reason}" in found.why
    monkeypatch.setattr(selfcheck, "compare", lambda *_: pytest.fail("asked again"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select() == found == select(dtype=None)
        monkeypatch.setattr(selfcheck, "compare", answer)
        assert select(scheme=(8, 128, True, 64, 256)).name == "reference"
    assert select(backend="triton") == ("triton", "asked for")


def test_a_named_backend_and_an_unknown_type_compare_nothing(gpu, monkeypatch):
    assert select(backend="triton").name == select(dtype=None).name == "triton"
    assert "before its first use" in select(dtype=None).why
    assert "not torch.float32" in select(dtype=torch.float32).why
    assert select(dtype=torch.float32).name == "reference"
    monkeypatch.setenv("QUANTKIT_BACKEND", "triton")
    assert select() == ("triton", "QUANTKIT_BACKEND says so")
    assert gpu == []


def test_nothing_is_compared_while_a_graph_is_captured(gpu, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert "captured" in select().why
        assert select().name == "reference"
        assert gpu == []
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert select().name == "triton"
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert select().name == "triton"


def test_threads_wait_for_one_comparison(gpu, monkeypatch):
    begun, go, found = threading.Event(), threading.Event(), []

    def compare(*scheme):
        gpu.append(scheme)
        begun.set()
        assert go.wait(10)

    monkeypatch.setattr(selfcheck, "compare", compare)
    threads = [threading.Thread(target=lambda: found.append(select().name)) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    assert found == []
    go.set()
    for thread in threads:
        thread.join()
    assert found == ["triton"] * 4
    assert len(gpu) == 1


@pytest.mark.filterwarnings("default")
def test_the_command_shows_what_was_found(gpu, monkeypatch, tmp_path, capsys):
    def rows(*options):
        assert run(["kernels", "--shape", "64x256", "--json", str(tmp_path / "found.json"), *options]) == 0
        found = json.loads((tmp_path / "found.json").read_text())["schemes"]
        found = [row for row in found if row["device"] == "cuda"]
        return {bits: (row["runs"], row["why"]) for row in found for bits in row["bits"]}

    monkeypatch.setattr(
        selfcheck, "compare", lambda _, number, *scheme: "wrong" if number == "int3" else None
    )
    assert all(runs == "triton" and "before its first use" in why for runs, why in rows().values())
    found = rows("--check")
    assert capsys.readouterr().err == "warning: the Triton kernels are not used on cuda:1: wrong\n"
    assert found[3][0] == "reference"
    assert "not triton: wrong" in found[3][1]
    assert found[4] == ("triton", "agrees with the reference on this device")
