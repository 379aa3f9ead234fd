"""Schemes as values: names as they are printed, and what cannot be said."""

import subprocess
import sys

import pytest

from quantkit.scheme import NUMBERS, PRESETS, Grid, KVScheme, Scheme, integer

FP8 = NUMBERS["fp8_e4m3"]


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (PRESETS["W8A16"], "W8A16 channel sym"),
        (PRESETS["W4A16"], "W4A16 g128 sym"),
        (PRESETS["W2A16"], "W2A16 g64 asym"),
        (Scheme(Grid(FP8, "channel")), "W8A16 fp8_e4m3 channel"),
        (Scheme(Grid(NUMBERS["nf4"], "group", 64)), "W4A16 nf4 g64"),
        (
            Scheme(integer(8, None), Grid(NUMBERS["int8"], "token", dynamic=True)),
            "W8A8 channel sym, inputs int8 token",
        ),
        (KVScheme(Grid(FP8, "head"), Grid(FP8, "head")), "KV fp8_e4m3 head"),
        (KVScheme(Grid(FP8, "head"), integer(4, 64, False)), "K fp8_e4m3 head, V int4 g64 asym"),
    ],
)
def test_printed_names(scheme, name):
    assert str(scheme) == name


def test_different_schemes_have_different_names():
    grids = [integer(b, g, s) for b in range(2, 9) for g in (None, 32, 128) for s in (True, False)]
    grids += [Grid(NUMBERS[n], "group", 32) for n in ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "nf4")]
    grids += [Grid(FP8, "block", 128), Grid(FP8, "group", 128)]
    inputs = [
        None,
        Grid(FP8, "token", dynamic=True),
        Grid(FP8, "tensor"),
        Grid(NUMBERS["int8"], "token", dynamic=True),
    ]
    schemes = [Scheme(g, i) for g in grids for i in inputs]
    assert len({str(s) for s in schemes}) == len(set(schemes)) == len(schemes)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ((FP8, "group"), "needs a group_size"),
        ((FP8, "tensor", 128), "has no group_size"),
        ((FP8, "channel", None, False), "only integers can be asymmetric"),
    ],
)
def test_what_no_grid_can_be(fields, reason):
    with pytest.raises(ValueError, match=reason):
        Grid(*fields)


def test_columns_per_scale():
    assert (integer(4, 32).group(96), integer(4, None).group(96)) == (32, 96)
    assert integer(4, 32).divides(96)
    assert not integer(4, 64).divides(96)


def test_schemes_need_no_torch():
    code = "import sys, quantkit.scheme; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
