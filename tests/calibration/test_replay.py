"""`Replay`: a finished part of a block gives what it would compute, without running."""

import pytest
import tiny_models
import torch

from quantkit.calibration.forward import patched
from quantkit.calibration.replay import Replay
from quantkit.structure.trace import first_output, trace

CHUNK = slice(0, 1)
FAMILIES = ["llama", "gpt2", "opt", "gemma2", "falcon", "gpt-neox"]


class Block:
    """One block of a family, its replay, and the inputs of the linears that end a part of it."""

    def __init__(self, family, **options):
        self.module, (self.hidden, self.args, self.kwargs) = tiny_models.block_and_call(family)
        self.trace = trace(self.module, self.hidden, self.args, self.kwargs)
        self.replay = Replay(self.module, self.trace, 128, **options)
        self.inputs = {}
        for linear in self.trace.output_of:
            last = self.trace.output_of[linear]
            self.module.get_submodule(last).register_forward_pre_hook(self._keep(last))
        self.plain = self.run()

    def _keep(self, linear):
        def hook(module, args):
            self.inputs[linear] = args[0]

        return hook

    @torch.no_grad()
    def run(self, full=False):
        """The block's output, with what may be replayed."""
        with patched(self.replay.forwards(CHUNK, full)):
            return first_output(self.module(self.hidden, *self.args, **self.kwargs))

    def keep(self, full=False):
        """Keep inputs as a run does: each when all linears before it have their final weights."""
        order = self.trace.siblings
        for linear, x in list(self.inputs.items()):
            self.replay.finished(name for each in order[: order.index((linear,))] for name in each)
            self.replay.keep((linear,), CHUNK, full, x)

    @torch.no_grad()
    def parts(self, full=False):
        return len(self.replay.forwards(CHUNK, full))


@pytest.fixture(params=FAMILIES)
def block(request):
    found = Block(request.param)
    assert found.inputs
    return found


def test_a_finished_part_gives_what_it_computed(block):
    block.keep()
    assert block.parts() < len(block.inputs)  # the last one is not finished
    block.replay.finished(block.inputs)
    assert block.parts() == len(block.inputs)
    for _ in range(2):
        torch.testing.assert_close(block.run(), block.plain)
    assert block.parts(full=True) == 0  # another stream, whose inputs were not kept
    block.replay.clear()
    assert block.parts() == 0


def test_inputs_of_weights_that_are_not_final_are_kept_of_the_original_stream_only():
    block = Block("llama")
    for linear, x in block.inputs.items():
        for full in (False, True):
            block.replay.keep((linear,), CHUNK, full, x)
    block.replay.finished(name for each in block.trace.siblings for name in each)
    assert block.parts(full=False) == 0
    assert block.parts(full=True) == len(block.inputs) == 2
    torch.testing.assert_close(block.run(full=True), block.plain)


def test_the_last_linear_runs_with_its_final_weight(block):
    block.keep()
    with torch.no_grad():  # of the last part, as the inputs of later ones would change
        block.module.get_submodule(list(block.inputs)[-1]).weight.mul_(0.5)
    block.replay.finished(block.inputs)
    replayed = block.run()
    block.replay.clear()
    torch.testing.assert_close(replayed, block.run())
    assert not torch.allclose(replayed, block.plain)


def test_what_a_model_does_to_an_output_does_not_reach_the_next_pass(block):
    block.keep()
    block.replay.finished(block.inputs)
    with torch.no_grad():
        for _, forward in block.replay.forwards(CHUNK, False):
            first_output(forward()).zero_()
    torch.testing.assert_close(block.run(), block.plain)


@pytest.mark.parametrize("case", ["disabled", "no budget"])
def test_nothing_is_kept_where_it_may_not_be(case):
    block = Block("llama", enabled=case != "disabled")
    if case == "no budget":
        block.replay.budget = 0
    block.keep()
    block.replay.finished(block.inputs)
    assert block.parts() == 0
    torch.testing.assert_close(block.run(), block.plain)
