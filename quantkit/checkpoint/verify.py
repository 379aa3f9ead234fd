"""Is the checkpoint on disk the one that was computed?

`verify_shard` runs while the quantized weights are still in memory: the file is opened again with the safetensors
library (not with our own reader), unpacked, compared code by code, and the stored tensors are multiplied on the
backend that `load` would choose and compared with the dequantized weight. `verify_checkpoint` needs only the folder:
digests, names, shapes and the account of every tensor.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from quantkit.checkpoint.check import damage
from quantkit.checkpoint.manifest import AGAIN
from quantkit.checkpoint.records import FileRecord, TensorRecord
from quantkit.checkpoint.shards import Written
from quantkit.device import find_device
from quantkit.errors import ModelError, VerificationError
from quantkit.formats.registry import Codec
from quantkit.layers.quant_linear import QuantLinear
from quantkit.models.digests import digests
from quantkit.models.json_reader import read_json
from quantkit.models.tensors import INDEX, named
from quantkit.numerics.inputs import InputScale, round_inputs
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Grid, Scheme

_PARTS = ("codes", "scale", "zero", "global_scale")
_PROBE = 4  # tokens of the packed product
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of its root mean square


@dataclass(frozen=True)
class Rounding:
    """What was written for a linear beside its weight: the grid of its inputs, and their range if it is stored."""

    inputs: Grid | None = None
    scale: InputScale | None = None


def verify_shard(
    path: Path,
    weights: Mapping[str, QuantizedWeight],
    codec: Codec,
    inputs: Mapping[str, Rounding] | None = None,
    scales: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Re-open a written shard and compare every quantized linear with `weights` (by module name).

    scales: of the KV cache, by tensor name; they must be there, bit for bit.
    """
    try:
        file = safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise VerificationError(f"{path} cannot be opened again: {error}") from error
    with file:
        for name, written in (scales or {}).items():
            if not _same(file.get_tensor(name) if name in file.keys() else None, written):  # noqa: SIM118
                raise VerificationError(f"{path.name}: what was read back for {name} is not what was written")
        for name, wanted in weights.items():
            prefix = f"{name}."
            stored = {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
            stored.pop("bias", None)
            rounding = (inputs or {}).get(name, Rounding())
            scheme = Scheme(wanted.grid, rounding.inputs)
            try:
                found = codec.unpack(stored, scheme)
            except ModelError as error:
                raise VerificationError(f"{path.name}: {name}: {error}") from error
            pairs = [(getattr(found, part), getattr(wanted, part)) for part in _PARTS]
            scale, read = rounding.scale, codec.inputs_of(stored)
            if scale is not None and read is not None:
                pairs += [(read.scale, scale.scale), (read.zero, scale.zero)]
            if not all(map(_same, *zip(*pairs, strict=True))) or (scale is None) != (read is None):
                raise VerificationError(f"{path.name}: what was read back for {name} is not what was written")
            x, given = probe(wanted.shape[1], rounding.inputs, stored[codec.scale].dtype, rounding.scale)
            dense = torch.nn.functional.linear(given, wanted.dequantize().cpu())
            _compare(name, stored, scheme, wanted.shape, x, dense, codec)


@dataclass(frozen=True)
class Made:
    """A linear [N, K] = shape that was written in pieces. dtype: the model's, in which scales are stored.

    product: that of the decoded weight with the inputs of `probe` [tokens, N].
    """

    shape: tuple[int, int]
    scheme: Scheme
    dtype: torch.dtype
    product: torch.Tensor


def verify_streamed(path: Path, written: Written, made: Mapping[str, Made], codec: Codec) -> None:
    """Re-open a shard whose linears were never whole in memory: every tensor of theirs has the bytes that were written,
    and the stored tensors give the product of what was decoded from the pieces.
    """
    try:
        file = safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise VerificationError(f"{path} cannot be opened again: {error}") from error
    with file:
        for name, wanted in made.items():
            stored = {}
            for leaf in codec.shapes(*wanted.shape, wanted.scheme):
                stored[leaf] = file.get_tensor(f"{name}.{leaf}")
                crc = zlib.crc32(stored[leaf].flatten().view(torch.uint8).numpy().data)
                if f"{crc:08x}" != written.crc32[f"{name}.{leaf}"]:
                    raise VerificationError(
                        f"{path.name}: what was read back for {name} is not what was written"
                    )
            x, _ = probe(wanted.shape[1], wanted.scheme.inputs, wanted.dtype)
            _compare(name, stored, wanted.scheme, wanted.shape, x, wanted.product, codec)


def probe(
    k: int, inputs: Grid | None, scale_dtype: torch.dtype, scale: InputScale | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs [tokens, K] that a linear is tried with, the same in fp32 as its scheme rounds them).

    scale_dtype: of its scales, where the model's type decides. scale: the stored range of its inputs.
    """
    x = torch.randn(_PROBE, k, generator=torch.Generator().manual_seed(0))
    if scale is not None:  # a probe that a stored range rounds to zeros would show nothing
        x *= 127 * scale.scale.float().cpu() / x.abs().max()
    x = x.to(_probed_as(scale_dtype))
    return x, (x if inputs is None else round_inputs(x, inputs, scale)).float()


def _probed_as(scale: torch.dtype) -> torch.dtype:
    """The type of the activations that a linear is tried with here."""
    if find_device(None).type == "cpu":
        return torch.float32
    return scale if scale in _TOLERANCE else torch.bfloat16


def _same(read: torch.Tensor | None, written: torch.Tensor | None) -> bool:
    """Whether two tensors have the same bytes."""
    if read is None or written is None:
        return read is written
    written = written.cpu()
    if read.dtype != written.dtype or read.shape != written.shape:
        return False
    small = read.element_size() == 1  # float8 has no comparison
    return (
        torch.equal(read.view(torch.uint8), written.view(torch.uint8))
        if small
        else torch.equal(read, written)
    )


@torch.no_grad()
def _compare(
    name: str,
    stored: dict[str, torch.Tensor],
    scheme: Scheme,
    shape: tuple[int, int],
    x: torch.Tensor,
    dense: torch.Tensor,
    codec: Codec,
) -> None:
    """Run the tensors of the file on the device and backend that `load` chooses, against the dense product."""
    where, (n, k) = find_device(None), shape
    linear = QuantLinear(k, n, scheme, False, stored[codec.scale].dtype, None, "meta", codec.name)
    for leaf, tensor in stored.items():
        setattr(linear, leaf, tensor.to(where))
    linear.prepare(None, x.dtype)
    off = (linear(x.to(where)).float().cpu() - dense).square().mean().sqrt()
    size = dense.square().mean().sqrt()
    if not float(off) <= _TOLERANCE[x.dtype] * float(size) + 1e-12:
        raise VerificationError(
            f"{name}: on backend {linear.backend!r} the packed product differs from the dequantized one by "
            f"{float(off):.3g} (root mean square; the product is {float(size):.3g})"
        )


def verify_checkpoint(
    output: Path, files: Mapping[str, FileRecord], account: Mapping[str, TensorRecord]
) -> None:
    """VerificationError unless the folder holds exactly what the manifest's `files` and `tensors` say."""
    for name in files:
        if not (output / name).is_file():
            raise VerificationError(f"{output}: {name} is missing; {AGAIN}")
    found = digests([output / name for name in files])
    for (name, entry), digest in zip(files.items(), found, strict=True):
        if digest != entry.sha256:
            where = damage(output / name, entry)
            raise VerificationError(f"{output}: {name} is not the file that was written{where}; {AGAIN}")
    stray = {each.name for each in output.glob("*.safetensors")} - files.keys()
    if stray:
        raise VerificationError(f"{output} holds weight files of another origin: {named(stray)}; remove them")
    weight_map = read_json(output / INDEX, VerificationError, advice=AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise VerificationError(f"{output / INDEX} has no weight_map; {AGAIN}")
    held: dict[str, str] = {}
    for name in sorted(set(weight_map.values())):
        try:
            with safe_open(output / name, "pt") as file:
                held |= dict.fromkeys(file.keys(), name)
        except (OSError, SafetensorError) as error:
            raise VerificationError(f"{output}: {name} cannot be opened: {error}") from error
    if held != weight_map:
        wrong = sorted(held.items() ^ weight_map.items())[:4]
        raise VerificationError(f"{output}: the index and the shards disagree: {wrong}")
    promised = {name for entry in account.values() for name in entry.became or ()}
    if promised != held.keys():
        raise VerificationError(
            f"{output}: tensors without an account: {sorted(promised ^ held.keys())[:4]} of {len(held)}"
        )
