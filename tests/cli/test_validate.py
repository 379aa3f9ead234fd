"""What `quantkit validate` prints of a model."""

from click.testing import CliRunner

from quantkit.assets import mixture_model
from quantkit.cli.validate import command


def test_experts_that_are_alike_share_a_row():
    asked = ["w4a16-rtn", "--model", str(mixture_model())]
    found = CliRunner().invoke(command, asked, env={"COLUMNS": "160"})
    assert found.exit_code == 0
    rows = [line for line in found.output.splitlines() if "model.layers." in line and " rtn" in line]
    assert [sum(f"experts.*.{leaf} (32)" in row for row in rows) for leaf in ("w1", "w2", "w3")] == [1, 1, 1]
    assert len(rows) == 3 + 4 * 4
