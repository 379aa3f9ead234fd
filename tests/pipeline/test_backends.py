"""A run on each backend: the same weights, verified and evaluated on the backend that `load` chooses."""

import os

import pytest
from quantkit_kernels.cpu import library

import quantkit
from quantkit.layers.quant_linear import QuantLinear

BACKENDS = ["reference", "torch", *(["cpu"] if library.available() else [])]


@pytest.fixture
def used(monkeypatch):
    """The backends that layers were prepared for."""
    names, prepare = [], QuantLinear.prepare

    def noted(self, *arguments, **options):
        done = prepare(self, *arguments, **options)
        names.append(self.backend)
        return done

    monkeypatch.setattr(QuantLinear, "prepare", noted)
    return names


def packed(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def test_every_backend_verifies_and_evaluates_the_same_weights(arguments, tmp_path, monkeypatch, used):
    assert os.environ["QUANTKIT_BACKEND"] == "auto"  # what the other tests of this folder run on
    found = {}
    for backend in BACKENDS:
        used.clear()
        monkeypatch.setenv("QUANTKIT_BACKEND", backend)
        given = arguments("rtn", tmp_path / backend, evaluate=True)
        found[backend] = quantkit.quantize(**given, eval_tokens=320).report.evaluation.quantized
        assert set(used) == {backend}
        assert packed(tmp_path / backend) == packed(tmp_path / BACKENDS[0])
    wanted = found["reference"].perplexity
    assert all(each.perplexity == pytest.approx(wanted, rel=0.05) for each in found.values())
