"""One function chooses how a model runs: what is asked for by name is taken or refused, never replaced."""

import pytest
import tiny_models
import torch
from quantkit_kernels.cpu import library

from quantkit.errors import BackendError
from quantkit.runtime import GraphDecoder, NativeDecoder, choose_runner, dispatch

needs_library = pytest.mark.skipif(
    not library.available(), reason="needs the native library (a C++ compiler)"
)


@pytest.fixture
def llama():
    return tiny_models.FAMILIES["llama"]()


@needs_library
@pytest.mark.parametrize("way", ["auto", "native"])
def test_a_family_that_the_native_path_knows_runs_native_on_the_cpu(llama, way):
    runner = choose_runner(llama, 4, way)
    assert isinstance(runner.model, NativeDecoder)
    assert (runner.way, runner.ran, runner.reason) == ("native", "native", None)


def test_another_family_runs_eager_with_the_reason():
    model = tiny_models.FAMILIES["gpt2"]()
    runner = choose_runner(model, 4)
    assert runner.model is model
    assert (runner.way, runner.ran) == ("eager", "eager")
    assert runner.reason


def test_eager_on_request_needs_no_reason(llama):
    assert choose_runner(llama, 4, "eager") == dispatch.Runner(llama, "eager")


def test_a_way_named_is_taken_or_refused(llama):
    with pytest.raises(BackendError, match=r"cannot run native: .*GPT2LMHeadModel"):
        choose_runner(tiny_models.FAMILIES["gpt2"](), 4, "native")
    with pytest.raises(
        BackendError, match="cannot run graph: CUDA graphs need the whole model on a CUDA device"
    ):
        choose_runner(llama, 4, "graph")
    with pytest.raises(BackendError, match="unknown way to run 'fast'; known: auto, native, graph, eager"):
        choose_runner(llama, 4, "fast")


def test_a_model_on_a_gpu_gets_graphs(llama, monkeypatch):
    monkeypatch.setattr(dispatch, "device_of", lambda model: torch.device("cuda"))
    monkeypatch.setattr(dispatch, "graphed", GraphDecoder)
    runner = choose_runner(llama, 7)
    assert (runner.way, runner.model.room) == ("graph", 7)
    monkeypatch.setattr(dispatch, "graphed", lambda model, room: "its parts are elsewhere")
    assert choose_runner(llama, 7) == dispatch.Runner(llama, "eager", "its parts are elsewhere")


def test_a_capture_that_failed_is_said_to_have_run_eager(llama, monkeypatch):
    runner = choose_runner(GraphDecoder(llama, 4), 4)
    assert runner.ran == "graph"
    monkeypatch.setattr(GraphDecoder, "why_eager", "it waits for the device")
    assert runner.ran == "eager"


def test_other_devices_run_eager_and_say_so(llama, monkeypatch):
    monkeypatch.setattr(dispatch, "device_of", lambda model: torch.device("mps"))
    assert choose_runner(llama, 4).reason == "there is no faster way on mps"
