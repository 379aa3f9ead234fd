"""Running a model token by token: natively on the CPU where its family fits, else as transformers does."""

from quantkit.runtime.generate import generate, stream
from quantkit.runtime.native import NativeDecoder, native

__all__ = ["NativeDecoder", "generate", "native", "stream"]
