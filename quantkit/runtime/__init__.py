"""Running a model token by token: native on the CPU, in a CUDA graph on a GPU, else as transformers does."""

from quantkit.runtime.dispatch import Runner, choose_runner
from quantkit.runtime.generate import generate, stream, stream_together
from quantkit.runtime.graphs import GraphDecoder, graphed
from quantkit.runtime.native import NativeDecoder, native
from quantkit.runtime.together import choose_batch

__all__ = [
    "GraphDecoder",
    "NativeDecoder",
    "Runner",
    "choose_batch",
    "choose_runner",
    "generate",
    "graphed",
    "native",
    "stream",
    "stream_together",
]
