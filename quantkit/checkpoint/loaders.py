"""Who can load a packed checkpoint, and how; found out from the schemes and from the model's own code.

What plain transformers does was seen with compressed-tensors 0.20 (docs/checkpoint.md); what vLLM has kernels for is a
table of `quantkit.preflight`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from quantkit.models import families
from quantkit.preflight.cache import engine_flag
from quantkit.preflight.check import preflight
from quantkit.preflight.experts import gathers
from quantkit.preflight.kernels import devices_for
from quantkit.preflight.subject import Subject
from quantkit.preflight.target import DEVICES, Target
from quantkit.scheme import KVScheme, Scheme

TRANSFORMERS = "transformers + compressed-tensors"
PLAIN = "AutoModelForCausalLM.from_pretrained(path)"
DEQUANTIZED = f"{PLAIN[:-1]}, quantization_config=CompressedTensorsConfig(dequantize=True))"
GPUS = ("sm80", "sm90", "sm100")  # if all of these run a scheme, nothing is said of the device


@dataclass(frozen=True)
class Loader:
    """One way to load a checkpoint. how: the call or command, or why it does not load. needs: what it takes beyond
    the ordinary, None if nothing. beware: what a reader of `how` may do wrong, None if nothing.
    """

    name: str
    loads: bool
    how: str
    needs: str | None = None
    beware: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.shown}"

    @property
    def shown(self) -> str:
        """All of it in one line, without the name."""
        line = f"{self.needs}: {self.how}" if self.needs else self.how
        return f"{line}; {self.beware}" if self.beware else line

    def report(self) -> dict[str, object]:
        """As `inspect` reports it."""
        return {"name": self.name, "loads": self.loads, "how": self.shown}


def loaders(model_type: str, schemes: dict[str, Scheme], kv: KVScheme | None = None) -> list[Loader]:
    """Who loads a model whose linears (by module name) have these schemes; empty: a model that is not quantized.

    model_type: "" leaves out what depends on the code of a family; transformers is not imported then. kv: how its
    cache is quantized, with stored scales or dynamic.
    """
    ours = Loader("quantkit", True, "quantkit.load(path)")
    stored = kv is not None and not kv.dynamic
    if kv is None and not schemes:
        return [ours, Loader("transformers", True, PLAIN)]
    if any(families.is_conv1d(model_type, name) for name in schemes):
        why = "linears of this family are Conv1D, which only quantkit.load runs packed"
        return [ours, Loader(TRANSFORMERS, False, why), Loader("vLLM", False, why)]
    plain = Loader(TRANSFORMERS if stored else "transformers", True, PLAIN)
    if schemes:
        plain = _transformers(model_type, schemes)
    engine = _vllm(set(schemes.values()))
    if kv is not None:
        plain, engine = _transformers_cache(plain, kv), _vllm_cache(engine, kv)
    return [ours, _beware(plain, schemes, stored), engine]


def of_mixture(who: list[Loader], subject: Subject) -> list[Loader]:
    """The same with what the experts of the checkpoint change: plain transformers makes others of some."""
    found = [each for each in preflight(subject, Target("transformers")) if each.rule == "experts"]
    if found:
        return [who[0], Loader(TRANSFORMERS, False, str(found[0])), *who[2:]]
    rounded = [each for each in subject.quantized if each.scheme is not None and each.scheme.inputs]
    if gathers(subject, rounded) and who[1].loads:
        said = "it leaves the inputs of experts as they are"
        return [who[0], replace(who[1], beware="; ".join(filter(None, (who[1].beware, said)))), *who[2:]]
    return who


def _beware(loader: Loader, schemes: dict[str, Scheme], stored: bool) -> Loader:
    """What dequantize=True of plain transformers would lose; where it must be used, `needs` says so."""
    drops = ["the rounding of inputs"] if any(scheme.inputs for scheme in schemes.values()) else []
    drops += ["that of the cache"] if stored and drops else ["the rounding of the cache"] if stored else []
    if not loader.loads or loader.how == DEQUANTIZED or not drops:
        return loader
    return replace(loader, beware=f"its dequantize=True drops {' and '.join(drops)}")


def _transformers_cache(loader: Loader, kv: KVScheme) -> Loader:
    """What becomes of the cache there; without stored scales nothing tells transformers of it."""
    if not loader.loads:
        return loader
    if kv.dynamic:
        said = "with an exact cache"
    elif loader.how == DEQUANTIZED:
        said = "with an exact cache, as dequantize drops its scales"
    else:
        said = "its cache is rounded and takes the memory of an exact one"
    return replace(loader, needs=said if loader.needs is None else f"{loader.needs}; {said}")


def _vllm_cache(loader: Loader, kv: KVScheme) -> Loader:
    """vLLM takes stored FP8 caches by itself, others that it has by an option; other stored ones it refuses."""
    if not loader.loads:
        return loader
    if not kv.dynamic and kv.keys.number.name != "fp8_e4m3":
        return Loader("vLLM", False, f"a stored cache {kv} makes vLLM refuse the checkpoint")
    flag, said = engine_flag(kv), None
    if kv.dynamic and flag:
        loader, said = replace(loader, how=f"{loader.how} {flag}"), "on devices that run its Triton attention"
    elif kv.dynamic:
        said = f"with an exact cache, for it has no {kv}"
    elif kv.keys.granularity == "head":
        said = "with FlashAttention 3 or later, for cache scales per head"
    needs = "; ".join(each for each in (loader.needs, said) if each)
    return replace(loader, needs=needs or None)


def _transformers(model_type: str, schemes: dict[str, Scheme]) -> Loader:
    kinds = set(schemes.values())
    reads = reads_weight(model_type, {name.rpartition(".")[2] for name in schemes})
    if all(scheme.weights.symmetric for scheme in kinds) and not reads:
        if any(scheme.weights.scale is not None for scheme in kinds):  # its forward fails in other types
            return Loader(TRANSFORMERS, True, f"{PLAIN[:-1]}, dtype=torch.bfloat16)", "in bfloat16 only")
        return Loader(TRANSFORMERS, True, PLAIN)
    if len(kinds) > 1:
        why = "several schemes: transformers 5.23 needs dequantize=True here, which gives a wrong model"
        return Loader(TRANSFORMERS, False, why)
    if reads:
        needs = f"the code of this family reads {reads}: transformers 5.17 no, 5.23 only with dequantize"
    else:
        needs = "transformers 5.17 to 5.22 plainly, 5.23 only with dequantize"
    if any(scheme.inputs for scheme in kinds):
        needs += ", which leaves inputs as they are"
    return Loader(TRANSFORMERS, True, DEQUANTIZED, needs)


def _vllm(kinds: set[Scheme]) -> Loader:
    """On the GPUs of today, by the table of `quantkit.preflight`; what a shard of a layer must be is asked there."""
    own, optional = _everywhere(kinds, optional=False), _everywhere(kinds, optional=True)
    few = sorted(str(scheme) for scheme in kinds if not set(GPUS) <= set(devices_for(scheme, "vllm")))
    nowhere = sorted(str(scheme) for scheme in kinds if not devices_for(scheme, "vllm"))
    if nowhere:
        return Loader("vLLM", False, f"it has no kernels for {', '.join(nowhere[:4])}")
    if set(GPUS) <= own:
        return Loader("vLLM", True, "vllm serve path")
    if set(GPUS) <= optional:
        every = {scheme: set(devices_for(scheme, "vllm", optional=False)) for scheme in kinds}
        odd = sorted(str(scheme) for scheme, devices in every.items() if not set(GPUS) <= devices)
        needs = f"on CUDA with its optional Humming kernels, for {', '.join(odd[:4])}"
        return Loader("vLLM", True, "vllm serve path", needs)
    where = ", ".join(name for name in DEVICES if name in optional)
    if not where:
        return Loader(
            "vLLM", False, f"no device has kernels for all of {', '.join(sorted(map(str, kinds))[:4])}"
        )
    return Loader(
        "vLLM", True, "vllm serve path", f"only on {where}, where it has kernels for {', '.join(few[:4])}"
    )


def _everywhere(kinds: set[Scheme], optional: bool) -> set[str]:
    """The devices on which vLLM has kernels for all of these schemes."""
    found = set(DEVICES)
    for scheme in kinds:
        found &= set(devices_for(scheme, "vllm", optional))
    return found


def reads_weight(model_type: str, linears: Iterable[str]) -> str | None:
    """Where the code of a family reads the `weight` of one of these linears itself, such as "c_proj.weight"; or None.

    Plain transformers runs packed linears without a `weight`, so that code fails before or while it runs. Looked for
    in the syntax tree of transformers' file: `x.NAME.weight`, and `self.weight` in a class derived from nn.Linear.
    What a forward reads only under a condition is another way of running (flash attention, tensor parallelism).
    """
    found = _weight_reads(model_type)
    own = [name for name in sorted(found) if name.endswith(" (its linear class)")]
    return next((f"{name}.weight" for name in sorted(linears) if name in found), own[0] if own else None)


@lru_cache(maxsize=64)
def _weight_reads(model_type: str) -> frozenset[str]:
    file = _modeling_file(model_type)
    if file is None:
        return frozenset()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    conditional = {
        id(inner)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name != "_init_weights"
        for branch in ast.walk(function)
        if isinstance(branch, ast.If)
        for inner in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(_is_linear(base) for base in node.bases):
            inner = (each for each in ast.walk(node) if isinstance(each, ast.Attribute))
            if any(each.attr == "weight" and _is_self(each.value) for each in inner):
                found.add(f"self.weight in {node.name} (its linear class)")
        elif _is_read(node) and id(node) not in conditional:
            found.add(node.value.attr)  # type: ignore[attr-defined]
    return frozenset(found)


def _modeling_file(model_type: str) -> Path | None:
    """transformers' file with the model of a type, or None for a type that it does not know."""
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations or not model_type.replace("-", "_").isidentifier():
        return None
    models = Path(spec.submodule_search_locations[0]) / "models"

    def named(name: str) -> Path:
        return models / name / f"modeling_{name}.py"

    if named(model_type).is_file():  # without transformers' table of names, which takes a second to import
        return named(model_type)
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    file = named(model_type_to_module_name(model_type))
    return file if file.is_file() else None


def _is_read(node: ast.AST) -> bool:
    """x.NAME.weight"""
    return isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.value, ast.Attribute)


def _is_linear(base: ast.expr) -> bool:
    return (isinstance(base, ast.Attribute) and base.attr == "Linear") or (
        isinstance(base, ast.Name) and base.id == "Linear"
    )


def _is_self(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id == "self"
