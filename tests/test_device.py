"""Device names: what torch does not know or this machine lacks is refused in words, never by torch's traceback."""

import pytest
import torch

from quantkit.device import Launch, cpu_name, find_device, launch
from quantkit.errors import ModelError


@pytest.mark.parametrize("name", ["auto", None])
def test_auto_takes_cuda_where_there_is_a_gpu(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device(name) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device(name) == torch.device("cuda")


@pytest.mark.parametrize("name", ["cpu", "cpu:3", torch.device("cpu")])
def test_the_cpu_is_one_device(name):
    assert find_device(name) == torch.device("cpu")


def test_a_gpu_index_must_exist(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ModelError, match="device cuda:2 is not available: this machine has 2 cuda devices"):
        find_device("cuda:2")


@pytest.mark.parametrize("name", ["meta", "xla", "hpu", "mtia", "privateuseone", "vulkan", "fpga"])
def test_a_device_that_torch_knows_and_this_machine_lacks_is_refused(name):
    with pytest.raises(ModelError, match=f"device {name} is not available"):
        find_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:x", "cuda:-1", "cpu\0", 3.5, []])
def test_what_is_not_a_device_is_refused(name):
    with pytest.raises(ModelError, match="is not a device; use auto, cpu, cuda or cuda:N"):
        find_device(name)


def test_a_device_can_be_named_without_being_there():
    """`inspect` predicts the memory of a model on another machine."""
    assert find_device("cuda:7", present=False) == torch.device("cuda:7")


def test_the_cpu_has_a_name():
    assert cpu_name().strip()


TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def test_torchrun_says_which_process_this_is():
    assert launch(TORCHRUN) == Launch(5, 8, 1, 4)
    assert launch({}) == launch(TORCHRUN | {"WORLD_SIZE": "1"}) == Launch(0, 1, 0, 1)
    assert launch({"RANK": "3"}) == Launch()  # of some other launcher


@pytest.mark.parametrize("wanted", ["auto", "cuda", None])
def test_each_of_several_processes_gets_a_gpu_of_its_own(wanted, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("quantkit.device._count", lambda kind: 2)
    assert find_device(wanted) == torch.device("cuda:1")
    assert find_device("cuda:0") == torch.device("cuda:0")
    assert find_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ModelError, match="cuda:2 is not available"):
        find_device(wanted)
