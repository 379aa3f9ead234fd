"""What `quantkit validate` prints of a model."""

from click.testing import CliRunner

from quantkit.assets import mixture_model
from quantkit.cli.validate import command


def test_experts_that_are_alike_share_a_row():
    found = CliRunner().invoke(
        command, ["w4a16-rtn", "--model", str(mixture_model())], env={"COLUMNS": "160"}
    )
    assert found.exit_code == 0
    rows = [
        line for line in found.output.splitlines() if "experts" in line and "W4A16" in line and "x" in line
    ]
    for leaf in ("w1", "w2", "w3"):
        assert sum(f"experts.*.{leaf} (32)" in row for row in rows) == 1
    assert "model.layers.3.self_attn.v_proj" in found.output
