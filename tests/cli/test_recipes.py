"""`quantkit recipes` says what each shipped recipe does and what loads its result."""

from quantkit import assets
from quantkit.cli.main import run
from quantkit.recipe import load_recipe


def test_symmetric_recipes_load_in_plain_transformers_and_others_on_a_condition(capsys):
    assert run(["recipes"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    assert "(1) transformers 5.17 to 5.22 plainly, 5.23 only with dequantize" in shown
    for name in assets.recipe_names():
        transformers, vllm = rows[name][-2:]
        weights = load_recipe(name).weights
        assert transformers == ("yes" if weights.symmetric else "(1)"), name
        assert (vllm == "yes") is (weights.bits in (4, 8)), name
