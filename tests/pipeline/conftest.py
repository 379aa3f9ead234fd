"""A tiny model in a folder, calibration text, and runs on one thread."""

from unittest.mock import patch

import interrupt
import pytest
import tiny_models
import torch

from quantkit import assets
from quantkit.pipeline.progress import Silent


@pytest.fixture(scope="module", autouse=True)
def backend(request):
    """The kernels that a user gets, in the module's fixtures and child processes too.

    A module that compares to the bit says BACKEND = "reference".
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_BACKEND", getattr(request.module, "BACKEND", "auto"))
        yield


@pytest.fixture(scope="module")
def steady():
    """One thread, as in the processes of `interrupt`, and no digest of the package's sources in the manifest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with patch(interrupt.SOURCE_DIGEST, str):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folder with `model` (Llama, 4 blocks, bf16) and `text`."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_models.save(
        tiny_models.FAMILIES["llama-gqa"](num_hidden_layers=4), folder / "model", dtype=torch.bfloat16
    )
    (folder / "text").write_text(assets.calibration_text().read_text()[:20000])
    return folder


@pytest.fixture(scope="module")
def arguments(inputs):
    """arguments(recipe name, output) -> keyword arguments of `quantize`, JSON-able."""
    weights = {"bits": 4, "group_size": 32, "symmetric": False}
    gptq = weights | {"algorithm": {"name": "gptq", "retarget": 1.0}}
    recipes = {
        "rtn": {"weights": weights | {"algorithm": "rtn"}},
        "gptq": {"weights": gptq},
        "gptq with head": {"weights": gptq, "rules": [{"match": "lm_head", "bits": 8}]},
        "awq": {"weights": gptq, "transforms": [{"name": "awq", "grid": 3, "windows": 4}]},
        "smoothquant": {"weights": gptq, "transforms": ["smoothquant"]},
        "smoothquant_plus": {
            "weights": weights | {"algorithm": {"name": "rtn", "range": "minmax"}},
            "transforms": [{"name": "smoothquant_plus", "search_windows": 4}],
        },
        "static": {"weights": {"preset": "W8A8_STATIC", "algorithm": "gptq"}},
    }
    calibration = {"data": [str(inputs / "text")], "samples": 8, "sequence_length": 32}

    def make(name, output, model=None, evaluate=False, **changes):
        recipe = recipes[name] | {"calibration": calibration} | changes
        model = model or inputs / "model"
        return {"recipe": recipe, "model": str(model), "output": str(output), "evaluate": evaluate}

    return make


class Recorder(Silent):
    """The progress protocol, remembering its messages."""

    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


@pytest.fixture
def progress():
    return Recorder()
