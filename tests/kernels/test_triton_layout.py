"""The storage of the Triton kernels, their op and backend, as far as they go without a device."""

import subprocess
import sys
from itertools import pairwise

import pytest
import quantkit_kernels
import torch
from packed_weights import same
from quantkit_kernels import BackendMissing, Spec, Stored, pack_bits, unpack_bits
from quantkit_kernels.reference.wna16_linear import wna16_linear
from quantkit_kernels.triton import backend, launch, layout
from quantkit_kernels.triton.configs import DEQUANTIZE_FROM, Config, bucket, choose, rule, table
from quantkit_kernels.triton.launch import tickets
from quantkit_kernels.triton.op import triton_linear


def stored(bits, n, k, group, symmetric, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=g)
    scale = torch.randn(n, k // group, generator=g).to(dtype)
    zero = torch.randint(0, 2**bits, (k // group, n), dtype=torch.uint8, generator=g)
    zero_packed = None if symmetric else pack_bits(zero, bits).T.contiguous()
    return Stored(pack_bits(codes, bits), scale, zero_packed, Spec.integer(bits, group, symmetric, n, k))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [(64, 256, 128), (1, 32, 32), (65, 192, 64), (70, 288, 96), (33, 100, 100), (5, 7, 7)],
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("by_row", [True, False])
def test_layout_round_trip(bits, n, k, group, symmetric, by_row):
    tensors = stored(bits, n, k, group, symmetric)
    built = layout.build(tensors, by_row)
    assert layout.is_by_row(built[0]) == by_row
    assert same(layout.restore(*built, tensors.spec), tensors)


@pytest.mark.parametrize(("n", "k", "group"), [(64, 256, 128), (65, 96, 32), (33, 100, 100)])
@pytest.mark.parametrize("by_row", [True, False])
def test_fp8_layout_round_trip(n, k, group, by_row):
    weight = torch.randn(n, k).to(torch.float8_e4m3fn)
    scale = torch.rand(n, k // group)
    codes, scales = layout.build_fp8(weight, scale, by_row)
    back, scale_back = layout.restore_fp8(codes, scales, group, n, k)
    assert torch.equal(back.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(scale_back, scale)
    with pytest.raises(ValueError, match="NaN"):
        layout.build_fp8(torch.full((n, k), torch.nan).to(torch.float8_e4m3fn), scale)


def test_a_thread_finds_its_fragment_in_16_bytes():
    # PTX, "Matrix fragments for mma.m16n8k16": lane 4 c + g holds rows c, c + 8 and columns 2 g + {0, 1, 8, 9}.
    planes = torch.arange(16)[:, None] * 32 + torch.arange(32)
    planes = torch.cat([planes, torch.zeros(48, 32, dtype=torch.int64)]).view(64, 1, 1, 32)
    units = layout.to_fragments(planes)[0, 0, 0].view(4, 8, 4, 16)[0]
    for c, g in ((0, 0), (3, 2), (7, 3)):
        expected = [
            (c + row) * 32 + 16 * step + 2 * g + column + pair
            for step in (0, 1)
            for column in (0, 8)
            for row in (0, 8)
            for pair in (0, 1)
        ]
        assert units[c, g].tolist() == expected


def test_by_row_a_thread_finds_its_row_in_16_bytes():
    planes = (torch.arange(64)[:, None] * 64 + torch.arange(64)).view(64, 1, 1, 64)
    units = layout.to_fragments(planes, by_row=True)[0, 0, 0].view(4, 64, 16)
    for i, r in ((0, 0), (3, 5), (2, 63)):
        assert units[i, r].tolist() == [64 * r + 16 * i + j for j in range(16)]


def test_groups_that_follow_each_other_share_a_word():
    weight = stored(4, 64, 320, 64, False)
    codes, scales, zeros = layout.build(weight)
    scale = layout.restore(codes, scales, zeros, weight.spec).scale
    assert scales.shape == zeros.shape == (1, 3, 64, 2)  # the last word is half empty
    assert torch.equal(scales[0, 1, :, 0], scale[:, 2])
    assert torch.equal(scales[0, 1, :, 1], scale[:, 3])
    assert not scales[0, 2, :, 1].any()


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("by_row", [True, False])
def test_weights_behind_each_other_are_one(bits, by_row):
    parts = [stored(bits, n, 320, 64, False) for n in (64, 128, 70)]
    built = [layout.build(part, by_row) for part in parts]
    codes, scales, zeros = (torch.cat(each) for each in zip(*built, strict=True))
    back = layout.restore(codes, scales, zeros, parts[0].spec.with_rows(262))
    assert torch.equal(back.packed, torch.cat([part.packed for part in parts]))
    assert torch.equal(back.scale, torch.cat([part.scale for part in parts]))
    unpacked = [unpack_bits(part.zero_packed.T, bits, part.spec.n) for part in parts]
    assert torch.equal(unpack_bits(back.zero_packed.T, bits, 262), torch.cat(unpacked, 1))


def test_w4_g128_is_half_a_byte_per_weight():
    codes, scales, zeros = layout.build(stored(4, 256, 1024, 128, True))
    assert zeros is None
    assert codes.numel() * 8 + scales.numel() * 16 == 256 * 1024 * 4.125


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, True), (3, 128, False), (8, 256, True)])
def test_twin_is_the_reference(bits, group, symmetric):
    tensors = stored(bits, 20, 256, group, symmetric)
    x, bias = torch.randn(2, 3, 256), torch.randn(20)
    y = triton_linear(x, *layout.build(tensors), bias, bits, group, 20, 256)
    assert torch.equal(y, wna16_linear(x, tensors, bias))


def test_fp8_twin_is_the_formula():
    weight, scale = torch.randn(20, 64).to(torch.float8_e4m3fn), torch.rand(20, 2)
    codes, scales = layout.build_fp8(weight, scale)
    x, bias = torch.randn(3, 64), torch.randn(20)
    w = weight.float() * scale.repeat_interleave(32, 1)
    y = triton_linear(x, codes, scales, None, bias, 8, 32, 20, 64)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w, bias))


def test_op_passes_opcheck():
    built = layout.build(stored(3, 20, 64, 32, False))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (torch.ones(2, 64), *built, torch.zeros(20), 3, 32, 20, 64)
    assert set(torch.library.opcheck(triton_linear, arguments, test_utils=checks).values()) == {"SUCCESS"}


@pytest.fixture
def on_cpu(monkeypatch):
    """The backend takes the CPU, where the twin runs."""
    monkeypatch.setattr(backend, "refuses", lambda *_: None)


@pytest.mark.usefixtures("on_cpu")
def test_backend_prepares_and_runs():
    tensors = stored(4, 20, 256, 128, False)
    triton = quantkit_kernels.backend("triton")
    prepared = triton.prepare(tensors, torch.bfloat16)
    x = torch.randn(3, 256).bfloat16()
    assert torch.equal(triton.bind(prepared, torch.bfloat16)(x, None), wna16_linear(x, tensors, None))
    assert same(triton.restore(prepared), tensors)
    with pytest.raises(BackendMissing, match="float32"):
        triton.prepare(tensors, torch.float32)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_of_any_type_is_part_of_the_one_op(dtype):
    tensors = stored(4, 20, 256, 128, False)
    triton = quantkit_kernels.backend("triton")
    prepared = triton.prepare(tensors, torch.bfloat16)
    x, bias = torch.randn(2, 3, 256).bfloat16(), torch.randn(20).to(dtype)
    with torch.profiler.profile() as profile:
        y = triton.linear(prepared, x, bias)
    assert torch.equal(y, wna16_linear(x, tensors, bias))
    outermost = [event.name for event in profile.events() if event.cpu_parent is None]
    assert [name for name in outermost if "profiler" not in name.lower()] == ["quantkit::triton_linear"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_op_refuses_what_does_not_fit(device):
    built = [t.to(device) for t in layout.build(stored(4, 20, 64, 32, False))]
    x, facts = torch.ones(2, 64, device=device), (4, 32, 20, 64)
    with pytest.raises(ValueError, match=r"bias must be \[20\].* got torch.float32 \[1\]"):
        triton_linear(x, *built, torch.ones(1, device=device), *facts)
    with pytest.raises(ValueError, match="x has 32 features, the weight takes 64"):
        triton_linear(x.view(4, 32), *built, None, *facts)


def test_backend_says_what_it_cannot_run():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert backend.refuses(Spec.integer(4, 128, True, 64, 256), cuda) is None
    assert backend.refuses(Spec.integer(3, 100, False, 7, 100), cuda) is None
    assert "not on cpu" in backend.refuses(Spec.integer(4, 128, True, 64, 256), cpu)
    assert "not 16" in backend.refuses(Spec.integer(4, 16, True, 64, 256), cuda)
    assert "not nf4" in backend.refuses(Spec("nf4", 4, 32, True, 64, 256), cuda)


def test_import_is_inert():
    code = (
        "import sys, quantkit_kernels.triton.backend, quantkit_kernels.triton.op;"
        "sys.exit('triton' in sys.modules or 'quantkit_kernels.triton.linear' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
    )


def test_tickets_of_calls_in_flight_do_not_overlap(monkeypatch):
    device = torch.device("cpu")
    taken = [tickets(device, count) for count in (4096, 100, 1, 448)]
    spans = sorted((t.data_ptr(), t.data_ptr() + 4 * len(t)) for t in taken)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert not any(t.any() or t.data_ptr() % 16 for t in taken)
    monkeypatch.setitem(launch._next, (device, False), launch._TICKETS - 10)
    assert len(tickets(device, 11)) == 11  # begins again, in one piece
    with pytest.raises(ValueError, match="at most"):
        tickets(device, launch._TICKETS + 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (28672, 4096), (4096, 14336), (10, 96), (128256, 4096)])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 128, 700])
def test_rule_covers_every_shape(bits, n, k, m):
    cut = layout.geometry(bits, 32, k)
    config = rule(bits, m, n, cut, 132)
    trips = cut.chunks // config.unroll
    each = -(-trips // config.splits)
    assert cut.chunks % config.unroll == 0
    assert (config.splits - 1) * each < trips <= config.splits * each  # no split is empty
    assert -(-n // config.bn) * -(-m // config.bm) <= 4096 or config.splits == 1
    assert config.bm == (min(bucket(m), 64) if bits in (2, 3) else bucket(m))


def test_a_measured_entry_wins_over_the_rule(tmp_path, monkeypatch):
    path = tmp_path / "chip.json"
    path.write_text(
        '{"dequantize_from": 300, "entries": [[4, 128, false, 16, 64, 256, [16, 128, 2, 1, 4, 5], 1.0]]}'
    )
    monkeypatch.setenv("QUANTKIT_TRITON_TABLE", str(path))
    table.cache_clear()
    cut = layout.geometry(4, 128, 256)
    assert choose("any", 4, 128, False, 3, 64, 256, cut, 132) == Config(16, 128, 2, 1, 4, 5)
    assert choose("any", 4, 128, False, 30, 64, 256, cut, 132).bm == 32
    assert table("any").dequantize_from == 300
    monkeypatch.delenv("QUANTKIT_TRITON_TABLE")
    table.cache_clear()
    assert table("no such chip").dequantize_from == DEQUANTIZE_FROM
