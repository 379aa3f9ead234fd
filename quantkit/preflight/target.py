"""What will serve a checkpoint: an engine, how many devices share a layer, and of which kind; without torch."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.errors import RecipeError

ENGINES = ("vllm", "sglang", "transformers", "quantkit")
NAMES = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers", "quantkit": "quantkit"}
MOST = 1024  # devices that may share a layer


@dataclass(frozen=True)
class Device:
    """A kind of device. capability: CUDA's, 90 for 9.0; None: a CPU. features: instruction sets of the CPU."""

    name: str
    capability: int | None = None
    features: frozenset[str] = frozenset()


_CUDA = (75, 80, 86, 89, 90, 100, 120)
DEVICES: dict[str, Device] = {f"sm{number}": Device(f"sm{number}", number) for number in _CUDA} | {
    "cpu": Device("cpu", features=frozenset({"avx512"})),  # what vLLM's CPU kernels are written for
    "cpu-avx2": Device("cpu-avx2"),
    "cpu-amx": Device("cpu-amx", features=frozenset({"avx512", "amx"})),
}


@dataclass(frozen=True)
class Target:
    """What must be able to run a checkpoint. gpu: a name of DEVICES; None: any device that the engine runs on."""

    engine: str
    tensor_parallel: int = 1
    gpu: str | None = None

    def __str__(self) -> str:
        where = f" on {self.gpu}" if self.gpu else ""
        shared = f", tensor_parallel {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        return f"{NAMES[self.engine]}{where}{shared}"

    @property
    def devices(self) -> tuple[Device, ...]:
        """The kinds of device that are meant; one of them is enough."""
        return (DEVICES[self.gpu],) if self.gpu else tuple(DEVICES.values())


def parse_target(text: str) -> Target:
    """A target written as "engine=vllm,tensor_parallel=4,gpu=sm90", or as the engine's name alone.

    RecipeError naming the part that is wrong, and what is known.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (each.strip() for each in part.partition("="))
        if not equals:
            key, value = "engine", key
        if key not in ("engine", "tensor_parallel", "gpu"):
            raise RecipeError(f"target: unknown key {key!r}; known: engine, tensor_parallel, gpu")
        if key in found:
            raise RecipeError(f"target: {key} is given twice in {text!r}; keep one")
        found[key] = value
    engine, gpu, count = found.get("engine"), found.get("gpu"), found.get("tensor_parallel", "1")
    if engine not in ENGINES:
        raise RecipeError(f"target: engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if gpu is not None and gpu not in DEVICES:
        raise RecipeError(f"target: gpu must be one of {', '.join(DEVICES)}, got {gpu!r}")
    if not count.isdecimal() or len(count) > 4 or not 1 <= int(count) <= MOST:
        raise RecipeError(f"target: tensor_parallel must be a number from 1 to {MOST}, got {count!r}")
    return Target(engine, int(count), gpu)
