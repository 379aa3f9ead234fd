"""The benchmark of GPTQ's solving, on weights that take no time."""

from quantkit.bench.kernels import gptq


def test_every_engine_solves_every_weight(capsys):
    rows = gptq.measure("cpu", 1, {"dense": (1, 32, 128), "experts": (3, 16, 128)})
    assert [set(row["engines"]) for row in rows] == [{"torch", "kernels"}, {"torch", "kernels", "batch"}]
    assert all(rate["gptq"]["median"] > 0 for row in rows for rate in row["engines"].values())
    assert set(rows[1]["times_torch"]) == {"kernels", "batch"}
    assert "times torch's ops" in capsys.readouterr().out
