"""KV caches: which engine runs which, and where."""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.preflight.subject import Finding, Subject
from quantkit.preflight.tables import source
from quantkit.preflight.target import Device, Target
from quantkit.scheme import KVScheme

_CT = "model_executor/layers/quantization/compressed_tensors/compressed_tensors.py"
_CPU = "v1/attention/backends/cpu_attn.py"
_FLASH = "v1/attention/backends/flash_attn.py"
_TRITON = "v1/attention/backends/triton_attn.py"
_EXACT = "leave kv_cache out, or serve with quantkit"


def engine_flag(scheme: KVScheme) -> str | None:
    """What makes vLLM run a cache as quantkit does; None: nothing.

    Its caches have no exact tokens, and its 4-bit one always rotates keys. Stored scales it finds in the checkpoint.
    """
    if scheme.keys != scheme.values or scheme.sinks or scheme.residual:
        return None
    if not scheme.dynamic:
        return "--kv-cache-dtype fp8"
    kind = (scheme.keys.number.name, scheme.rotate)
    known = {("int8", False): "int8_per_token_head", ("int4", True): "int4_per_token_head"}
    return f"--kv-cache-dtype {known[kind]}" if kind in known and scheme.keys.group_size is None else None


def caches(subject: Subject, target: Target) -> Iterator[Finding]:
    """What is wrong with the cache of a checkpoint in an engine."""
    kv, engine = subject.kv, target.engine
    if kv is None or engine == "quantkit":
        return
    if engine == "transformers":
        if kv.dynamic:
            yield _finding(
                kv, "is not stored, so transformers runs an exact cache", "serve with quantkit", target, ""
            )
        return
    if not kv.dynamic and kv.keys.number.name != "fp8_e4m3":
        yield _finding(
            kv, "with stored scales makes it refuse the checkpoint", "use kv_cache: FP8", target, _CT
        )
        return
    if engine_flag(kv) is None:
        yield _finding(kv, "is no cache it has", f"use kv_cache: FP8, INT8 or INT4, or {_EXACT}", target, _CT)
        return
    if engine == "sglang":
        if kv.keys.number.name != "fp8_e4m3" or kv.keys.granularity != "tensor":
            yield _finding(kv, "is no cache it loads", "use kv_cache: FP8_TENSOR", target, "mem_cache")
        return
    reasons = [_vllm(kv, device) for device in target.devices]
    if all(reason is not None for reason in reasons):
        said, remedy, file = next(reason for reason in reasons if reason is not None)
        yield _finding(kv, said, remedy, target, file)


def _vllm(kv: KVScheme, device: Device) -> tuple[str, str, str] | None:
    """(what is wrong, what to change, the file that says so) of a cache that vLLM has, on a kind of device."""
    if device.capability is None:
        if kv.dynamic:
            return "needs Triton attention, which a CPU has not", _EXACT, _TRITON
        if "avx512" not in device.features:
            return "needs a CPU with AVX-512", f"use a CPU with AVX-512, or {_EXACT}", _CPU
        if kv.keys.granularity == "head":
            return "has scales per head, which CPU attention does not take", "use kv_cache: FP8_TENSOR", _CPU
        return None
    if not kv.dynamic and kv.keys.granularity == "head" and device.capability < 90:
        said = "has scales per head, which only FlashAttention 3 and later take (sm90)"
        return said, "use kv_cache: FP8_TENSOR", _FLASH
    return None


def _finding(kv: KVScheme, said: str, remedy: str, target: Target, file: str) -> Finding:
    where = source(target.engine, file) if target.engine != "transformers" else "transformers 5.23"
    return Finding("cache", "", f"{kv} {said} ({target})", remedy, where)
