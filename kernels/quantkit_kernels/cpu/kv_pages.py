"""Attention over pages of a quantized KV cache: the op `quantkit::kv_pages`, native on the CPU.

Layout and arithmetic: `reference/kv_pages.py`, whose function is the twin that runs elsewhere. The native code reads
codes where they lie, in blocks of 64 tokens, and keeps no dense copy of a page.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch

from quantkit_kernels.checks import check_part
from quantkit_kernels.cpu import library
from quantkit_kernels.cpu.ops import direct
from quantkit_kernels.reference import kv_pages as twin
from quantkit_kernels.reference.kv_pages import Sums
from quantkit_kernels.registration import define

ENVIRONMENT = "QUANTKIT_BACKEND"
CODES = {torch.int8: 0, torch.float8_e4m3fn: 1, torch.uint8: 2}  # QK_KV_..., of kv_pages.h
_FAR = 1 << 40  # tokens; more would overflow in C
_MASKS = {torch.bool: 1, torch.float32: 2}
_SCHEMA = (
    "(Tensor q, Tensor[] k, Tensor[] k_scale, Tensor[] v, Tensor[] v_scale, Tensor? mask, int length, int position, "
    "int tokens, float softcap, Tensor top, Tensor mass, Tensor out) -> (Tensor, Tensor, Tensor)"
)


class _Side(ctypes.Structure):
    """`qk_kv_side` of kv_pages.h."""

    _fields_ = (
        ("codes", POINTER(c_void_p)),
        ("scales", POINTER(c_void_p)),
        ("stored", c_void_p),
        ("type", c_int32),
        ("dim", c_int32),
    )


class _Pages(ctypes.Structure):
    """`qk_kv_pages` of kv_pages.h."""

    _fields_ = (
        ("q", c_void_p),
        ("k", _Side),
        ("v", _Side),
        ("mask", c_void_p),
        *((f"mask_{name}", c_int64) for name in ("batch", "head", "token")),
        *((name, c_void_p) for name in ("top", "mass", "out")),
        *((name, c_int64) for name in ("batch", "kv_heads", "rows", "tokens", "page", "places", "position")),
        ("mask_type", c_int32),
        ("softcap", c_float),
    )


class Given(NamedTuple):
    """The arguments of `kv_pages`, in its order; `reference/kv_pages.py` says what they are."""

    q: torch.Tensor
    k: Sequence[torch.Tensor]
    k_scale: Sequence[torch.Tensor]
    v: Sequence[torch.Tensor]
    v_scale: Sequence[torch.Tensor]
    mask: torch.Tensor | None
    length: int
    position: int
    tokens: int
    softcap: float
    top: torch.Tensor
    mass: torch.Tensor
    out: torch.Tensor


def runs_on(device: torch.device) -> tuple[str, str]:
    """("cpu" or "reference", why): what attention over quantized pages runs on.

    QUANTKIT_BACKEND=cpu or =reference decides; else the native code where it is built. RuntimeError if it is not, but
    asked for by name.
    """
    forced = os.environ.get(ENVIRONMENT)
    if forced == "reference":
        return "reference", f"{ENVIRONMENT} says so"
    if device.type != "cpu":
        return "reference", f"the native kernels run on the CPU, not on {device.type}"
    if not library.available():
        if forced == "cpu":
            library.required()
        return "reference", f"not cpu: the native kernels are not built; {library.ADVICE}"
    return "cpu", f"path {library.isa()}"


def attend(given: Given) -> Sums:
    """`Sums` with the pages taken in: the op, called directly when nothing observes the call.

    Gradients reach q only, and through the twin: codes have none.
    """
    if direct(given.q):
        return _run(given)
    differentiable = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (given.q, given.top, given.mass, given.out)
    )
    return Sums(*(twin.kv_pages(*given) if differentiable else kv_pages(*given)))


def native(given: Given, sums: Sums) -> None:
    """Take the pages into `sums`, in place, by the native code."""
    b, heads, rows, _ = given.q.shape
    mask, strides = given.mask, (0, 0, 0)
    if mask is not None:
        if mask.stride(3) != 1 and mask.shape[3] > 1:
            mask = mask.contiguous()
        batch, head, token = (0 if mask.shape[dim] == 1 else mask.stride(dim) for dim in (0, 1, 2))
        strides = batch, head, token
    facts = _Pages(
        given.q.data_ptr(),
        _side(given.k, given.k_scale),
        _side(given.v, given.v_scale),
        None if mask is None else mask.data_ptr(),
        *strides,
        *(tensor.data_ptr() for tensor in sums),
        *(b, heads, rows, given.tokens, given.k[0].shape[2], given.length, given.position),
        0 if mask is None else _MASKS[mask.dtype],
        given.softcap,
    )
    status = _entry()(ctypes.byref(facts), torch.get_num_threads())
    if status == 2:
        raise MemoryError("no memory for attention over a quantized KV cache")
    if status:
        library.isa()  # says so if the forced instruction set is missing
        raise AssertionError("pages that were checked were refused")


def _side(pages: Sequence[torch.Tensor], scales: Sequence[torch.Tensor]) -> _Side:
    size = len(pages)
    codes = (c_void_p * size)(*(page.data_ptr() for page in pages))
    width = pages[0].shape[3] * (2 if pages[0].dtype == torch.uint8 else 1)
    kind = CODES[pages[0].dtype]
    if scales[0].dim() == 1:
        return _Side(codes, None, scales[0].data_ptr(), kind, width)
    return _Side(codes, (c_void_p * size)(*(scale.data_ptr() for scale in scales)), None, kind, width)


def _entry() -> Callable[..., int]:
    function: Callable[..., int] = library.required().qk_kv_attend
    return function


def check(given: Given) -> None:
    """Raise ValueError unless queries, pages, mask and sums fit together: native code trusts sizes."""
    q, mask = given.q, given.mask
    if q.dim() != 4 or not q.is_floating_point():
        raise ValueError(f"q must be a float [B, H, R, D], got {q.dtype} {list(q.shape)}")
    b, heads, rows, d = q.shape
    tokens, length = given.tokens, given.length
    if tokens < 1 or rows % tokens:
        raise ValueError(f"{rows} rows are not those of whole heads of {tokens} tokens")
    if not -_FAR < given.position < _FAR:
        raise ValueError(f"a position is less than {_FAR} in size, got {given.position}")
    if not given.k or len(given.k) != len(given.v):
        raise ValueError(
            f"there must be as many pages of keys as of values, got {len(given.k)}, {len(given.v)}"
        )
    page = given.k[0].shape[2] if given.k[0].dim() == 4 else 0
    if not (len(given.k) - 1) * page < length <= len(given.k) * page:
        raise ValueError(f"{length} tokens do not end in the last of {len(given.k)} pages of {page}")
    for name, pages, scales, width in (
        ("keys", given.k, given.k_scale, d),
        ("values", given.v, given.v_scale, given.out.shape[-1]),
    ):
        kind = pages[0].dtype
        if kind not in CODES or (kind == torch.uint8 and width % 2):
            raise ValueError(
                f"codes are int8, float8_e4m3fn or pairs in uint8, got {kind} for {width} channels"
            )
        of = [b, heads, page, width // 2 if kind == torch.uint8 else width]
        for codes in pages:
            check_part(f"codes of {name}", codes, of, (kind,), q.device)
        stored = len(scales) == 1 and scales[0].dim() == 1
        if not stored and len(scales) != len(pages):
            raise ValueError(f"{name} have {len(pages)} pages and {len(scales)} scales")
        for scale in scales:
            of = [heads] if stored else [b, heads, page, 1]
            check_part(f"scales of {name}", scale, of, (torch.float32,), q.device)
    if mask is not None:
        fits = mask.dim() == 4 and mask.shape[0] in (1, b) and mask.shape[1] in (1, heads * rows // tokens)
        fits = fits and mask.shape[2:] == (tokens, length) and mask.device == q.device
        if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise ValueError(
                f"a mask is bool or float [{b} or 1, {heads * rows // tokens} or 1, {tokens}, {length}], got "
                f"{mask.dtype} {list(mask.shape)}"
            )
    for name, tensor in zip(Sums._fields, (given.top, given.mass, given.out), strict=True):
        of = [b, heads, rows, given.out.shape[-1]][: 4 if name == "out" else 3]
        check_part(name, tensor, of, (q.dtype,), q.device)


def _run(given: Given) -> Sums:
    check(given)
    if given.q.dtype != torch.float32 or runs_on(given.q.device)[0] != "cpu":
        return Sums(*twin.kv_pages(*given))
    mask = given.mask
    if mask is not None and mask.dtype not in _MASKS:
        mask = mask.float()
    sums = Sums(given.top.clone(), given.mass.clone(), given.out.clone())
    native(given._replace(q=given.q.contiguous(), mask=mask), sums)
    return sums


def _fake(*arguments: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    given = Given(*arguments)  # type: ignore[arg-type]
    check(given)
    return torch.empty_like(given.top), torch.empty_like(given.mass), torch.empty_like(given.out)


define("kv_pages", _SCHEMA, {"CompositeExplicitAutograd": lambda *given: _run(Given(*given))}, _fake)

kv_pages: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = torch.ops.quantkit.kv_pages.default
