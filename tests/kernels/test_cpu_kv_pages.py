"""Attention over pages of a quantized KV cache: every native path and the torch twin against fp64."""

import itertools

import pytest
import torch
from cpu_paths import assert_close
from quantkit_kernels.cpu import kv_pages, library
from quantkit_kernels.cpu.kv_pages import Given, Sums
from quantkit_kernels.reference import kv_pages as twin
from wrong_arguments import refusals

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")

KINDS = ("int8", "int4", "fp8_e4m3")
SCALES = {"int8": 0.02, "int4": 0.3, "fp8_e4m3": 0.01}
NAN = float("nan")


@pytest.fixture(autouse=True)
def _auto(monkeypatch):
    """What users get, not the reference that other tests compare with."""
    monkeypatch.delenv(kv_pages.ENVIRONMENT, raising=False)


def codes_of(kind, shape, g):
    """Random codes, none of them NaN."""
    if kind == "int8":
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=g)
    if kind == "int4":
        return torch.randint(0, 256, (*shape[:3], shape[3] // 2), dtype=torch.uint8, generator=g)
    bits = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)
    bits[(bits & 127) == 127] = 0
    return bits.view(torch.float8_e4m3fn)


def spoil(codes, scale, rest):
    """What is behind the last token is never read: the worst there."""
    if codes.dtype != torch.uint8:
        codes.view(torch.uint8)[:, :, rest:] = 0x7F
    if scale.dim() > 1:
        scale[:, :, rest:] = NAN


def given_of(
    kinds,
    b=2,
    heads=2,
    group=3,
    tokens=1,
    d=32,
    count=70,
    page=48,
    mask=None,
    stored=False,
    softcap=0.0,
    seed=0,
):
    """Arguments of the op. mask: None, "padded", "window" (bool), "float", "heads"."""
    g = torch.Generator().manual_seed(seed + d + tokens)
    sides = []
    for kind in kinds:
        pages = [codes_of(kind, (b, heads, page, d), g) for _ in range(-(-count // page))]
        if stored:
            scales = [torch.rand(heads, generator=g).add(0.2) * SCALES[kind]]
        else:
            scales = [torch.rand(b, heads, page, 1, generator=g).add(0.2) * SCALES[kind] for _ in pages]
        spoil(pages[-1], scales[-1], count - page * (len(pages) - 1))
        sides += [pages, scales]
    rows = group * tokens
    seen = mask_of(mask, b, heads * group, tokens, count, g)
    sums = (
        torch.full((b, heads, rows), -torch.inf),
        torch.zeros(b, heads, rows),
        torch.zeros(b, heads, rows, d),
    )
    q = torch.randn(b, heads, rows, d, generator=g) * d**-0.5
    return Given(q, *sides, seen, count, count - tokens, tokens, softcap, *sums)


def mask_of(name, b, heads, tokens, count, g):
    if name is None:
        return None
    place, token = torch.arange(count), torch.arange(count - tokens, count)[:, None]
    seen = (place <= token)[None, None].expand(b, 1, -1, -1).clone()
    if name == "padded":
        seen[0, :, :, : count // 2] = False
        seen[0, :, : tokens // 2] = False  # rows that see nothing
    elif name == "window":
        seen &= place > token - 9
    elif name == "heads":
        return torch.randn(b, heads, tokens, count, generator=g).masked_fill(~seen, -torch.inf)
    elif name == "float":
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return seen


def exact(given):
    """The result in fp64, all at once and by another way than the twin's."""

    def read(pages, scales):
        full = torch.cat(
            [
                twin.entries(codes, scales[min(i, len(scales) - 1)], codes.shape[2], torch.float64)
                for i, codes in enumerate(pages)
            ],
            2,
        )
        return full[:, :, : given.length]

    keys, values = read(given.k, given.k_scale), read(given.v, given.v_scale)
    scores = given.q.double() @ keys.transpose(2, 3)
    if given.softcap:
        scores = given.softcap * torch.tanh(scores / given.softcap)
    scores = twin.hidden(scores, given.mask, given.position, given.tokens)
    return torch.nan_to_num(scores.softmax(-1), nan=0.0) @ values


def result(sums):
    return sums.out / sums.mass.clamp(min=1e-30)[..., None]


def ways(given):
    """What the bare call, the op and the twin give; memory around the bare call's sums stays as it was."""
    guarded = [torch.cat([torch.full_like(t[:1], NAN), t, torch.full_like(t[:1], NAN)]) for t in given[-3:]]
    inner = Sums(*(t[1:-1] for t in guarded))
    kv_pages.native(given, inner)
    assert all(bool(t[0].isnan().all() and t[-1].isnan().all()) for t in guarded)
    for found in (kv_pages.attend(given), kv_pages.kv_pages(*given)):
        for one, other in zip(found, inner, strict=True):
            assert torch.equal(one, other)
    return {"native": result(inner), "twin": result(Sums(*twin.kv_pages(*given)))}


def assert_right(name, given, limit=2e-6):
    truth = exact(given)
    for way, found in ways(given).items():
        assert not found.isnan().any(), f"{name} {way}"
        assert_close(f"{name} {way}", found, truth, limit)


@pytest.mark.parametrize("keys", KINDS)
@pytest.mark.parametrize("stored", [False, True], ids=["per-token", "stored"])
def test_close_to_fp64_in_awkward_shapes(path, keys, stored):
    values = KINDS[(KINDS.index(keys) + stored) % 3]  # the same and another
    for d, count, page in [
        (64, 70, 48),
        (20, 1, 256),
        (8, 257, 256),
        (80, 63, 63),
        (128, 130, 130),
        (34, 5, 3),
    ]:
        for group, tokens in [(1, 1), (8, 1), (3, 1), (2, 7), (1, 33)]:
            if tokens > count:
                continue
            given = given_of(
                (keys, values), group=group, tokens=tokens, d=d, count=count, page=page, stored=stored
            )
            assert_right(f"{path} {keys}/{values} d={d} S={count} g={group} T={tokens}", given)


@pytest.mark.parametrize("mask", ["padded", "window", "float", "heads"])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_masks_windows_and_caps(path, mask, softcap):
    for kind, tokens in zip(KINDS, (1, 12, 40), strict=True):
        given = given_of((kind, kind), tokens=tokens, count=150, mask=mask, softcap=softcap)
        assert_right(f"{path} {kind} {mask} T={tokens}", given, 4e-6)


@pytest.mark.parametrize("mask", [None, "padded", "window"])
def test_more_rows_than_a_tile_holds(path, mask):
    """131 rows of a head: a full tile and a rest, blocks that some rows, all and none of them see."""
    for kind, d in zip(KINDS, (64, 34, 48), strict=True):
        given = given_of((kind, kind), b=1, heads=1, group=1, tokens=131, d=d, count=260, page=100, mask=mask)
        assert_right(f"{path} {kind} {mask} d={d}", given, 4e-6)


def test_a_row_that_sees_nothing_stays_as_it_was(path):
    given = given_of(("int8", "int8"), tokens=4, mask="padded", count=70)
    sums = kv_pages.attend(given)
    blind = torch.zeros(2, 2, 12, dtype=torch.bool)
    blind.view(2, 2, 3, 4)[0, :, :, :2] = True
    assert torch.equal(sums.top == -torch.inf, blind)
    assert torch.equal(sums.mass == 0, blind)
    assert not sums.out[blind].any()


def test_calls_continue_each_other(path):
    """Two runs of pages, the second on top of the first, are one; also behind sums of something else."""
    given = given_of(("int8", "int4"), count=96, page=48, tokens=5, mask="window")
    before = twin.take_in(Sums(*given[-3:]), torch.randn(2, 2, 15, 4), torch.randn(2, 2, 4, 32))
    given = given._replace(top=before.top, mass=before.mass, out=before.out)
    whole, sums = kv_pages.attend(given), before
    for i in (0, 1):
        part = given._replace(
            **{name: getattr(given, name)[i : i + 1] for name in ("k", "k_scale", "v", "v_scale")},
            mask=given.mask[..., 48 * i : 48 * (i + 1)],
            length=48,
            position=given.position - 48 * i,
        )
        sums = kv_pages.attend(part._replace(top=sums.top, mass=sums.mass, out=sums.out))
    assert_close("in two calls", result(sums), result(whole).double(), 1e-6)
    assert (
        float((result(whole) - result(kv_pages.attend(given._replace(mass=given.mass * 2)))).abs().max())
        > 1e-3
    )


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_nan_in_a_query_reaches_its_own_row_only(path, bad):
    for kind, group in itertools.product(KINDS, (1, 9)):
        given = given_of((kind, kind), group=group)
        given.q[1, 0, 0, 3] = bad
        found = result(kv_pages.attend(given))
        assert found[1, 0, 0].isnan().all()
        found[1, 0, 0] = 0
        assert not found.isnan().any()


def test_nan_entries_are_not_read_as_numbers(path):
    """FP8 has a NaN, which the processor's conversion would read as 480."""
    for side, d in itertools.product(("k", "v"), (20, 64)):
        given = given_of(("fp8_e4m3", "fp8_e4m3"), d=d)
        for channel, code in ((1, 0x7F), (d - 1, 0xFF)):
            bits = getattr(given, side)[0].view(torch.uint8)
            kept = bits[1, 1, 5, channel].clone()
            bits[1, 1, 5, channel] = code
            found = result(kv_pages.attend(given))
            bits[1, 1, 5, channel] = kept
            assert found[1, 1, :, channel].isnan().all()
            assert not found[0].isnan().any()


def test_every_code_is_its_value(path):
    """With one token in the cache attention gives its value back."""
    for kind in KINDS:
        values = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256)
        if kind == "fp8_e4m3":
            values[values & 127 == 127] = 0
        v = values.view({"int8": torch.int8, "int4": torch.uint8, "fp8_e4m3": torch.float8_e4m3fn}[kind])
        d = 512 if kind == "int4" else 256
        given = given_of((kind, kind), b=1, heads=1, group=1, d=d, count=1, page=1, stored=True)
        given = given._replace(v=[v], v_scale=[torch.ones(1)])
        expected = twin.entries(v, torch.ones(1), 1, torch.float32)
        assert torch.equal(result(kv_pages.attend(given)), expected)
        if kind == "int4":
            assert expected.flatten()[:4].tolist() == [0.0, 0.0, 1.0, 0.0]
            assert expected.flatten()[-2:].tolist() == [-1.0, -1.0]


def test_threads_change_nothing(path):
    given = given_of(("int8", "int8"), b=1, group=8, d=64, count=2300, page=256)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5, 16):
            torch.set_num_threads(threads)
            found.append(result(kv_pages.attend(given)))
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert_close("threads", one, found[0].double(), 1e-6)


def test_the_op_is_one_node_and_passes_opcheck():
    given = given_of(("int8", "int4"), mask="window", tokens=2)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    found = torch.library.opcheck(kv_pages.kv_pages, tuple(given), test_utils=checks)
    assert set(found.values()) == {"SUCCESS"}
    compiled = torch.compile(lambda *rest: kv_pages.kv_pages(*rest), backend="aot_eager", fullgraph=True)
    for one, other in zip(compiled(*given), kv_pages.attend(given), strict=True):
        assert torch.equal(one, other)


def test_gradients_reach_the_queries():
    given = given_of(("int8", "int8"), tokens=2)
    q = given.q.clone().requires_grad_()
    result(kv_pages.attend(given._replace(q=q))).square().sum().backward()
    wanted = given.q.double().requires_grad_()
    exact(given._replace(q=wanted)).square().sum().backward()
    assert_close("gradient", q.grad, wanted.grad, 1e-5)


def test_without_the_library_the_twin_runs_and_says_so(monkeypatch):
    given = given_of(("int8", "int8"))
    assert kv_pages.runs_on(torch.device("cpu"))[0] == "cpu"
    assert kv_pages.runs_on(torch.device("cuda"))[0] == "reference"
    monkeypatch.setenv("QUANTKIT_BACKEND", "reference")
    assert kv_pages.runs_on(torch.device("cpu")) == ("reference", "QUANTKIT_BACKEND says so")
    monkeypatch.delenv("QUANTKIT_BACKEND")
    monkeypatch.setattr(library, "load", lambda: None)
    name, why = kv_pages.runs_on(torch.device("cpu"))
    assert (name, why.startswith("not cpu: the native kernels are not built")) == ("reference", True)
    for one, other in zip(kv_pages.attend(given), twin.kv_pages(*given), strict=True):
        assert torch.equal(one, other)
    monkeypatch.setenv("QUANTKIT_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="are not built"):
        kv_pages.attend(given)


def test_wrong_arguments_are_refused_by_name():
    def arguments():
        return list(given_of(("int8", "int8"), mask="window", tokens=2))

    def call(*arguments):
        kv_pages.attend(Given(*arguments))

    assert refusals(call, arguments, 150, "kv pages") > 75
    given = given_of(("int8", "int8"))
    for change, says in (
        ({"k": [given.k[0].float(), given.k[1]]}, "codes are int8"),
        ({"k": given.k[:1]}, "as many pages of keys as of values"),
        ({"length": 97}, "97 tokens do not end in the last of 2 pages of 48"),
        ({"length": 48}, "48 tokens do not end in the last of 2 pages of 48"),
        ({"v_scale": given.v_scale[:1]}, "values have 2 pages and 1 scales"),
        ({"k_scale": [torch.ones(3)]}, "scales of keys must be contiguous torch.float32 .2."),
        ({"mask": torch.ones(2, 1, 1, 69, dtype=torch.bool)}, "a mask is bool or float"),
        ({"tokens": 2}, "3 rows are not those of whole heads of 2 tokens"),
        ({"out": given.out[..., :31]}, "codes of values"),
    ):
        with pytest.raises(ValueError, match=says):
            kv_pages.attend(given._replace(**change))
