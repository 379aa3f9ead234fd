"""`quantkit recipes` says what each shipped recipe does and what loads its result."""

from quantkit import assets
from quantkit.cli.main import run
from quantkit.recipe.recipe import load_recipe


def test_symmetric_recipes_load_in_plain_transformers_and_others_on_a_condition(capsys):
    assert run(["recipes"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    condition = " transformers 5.17 to 5.22 plainly, 5.23 only with dequantize"
    number = next(line for line in shown.splitlines() if line.endswith(condition)).removesuffix(condition)
    for name in assets.recipe_names():
        recipe = load_recipe(name)
        transformers, vllm = rows[name][-2:]
        scheme = None if recipe.weights is None else recipe.weights.scheme
        if scheme is None or recipe.inputs or recipe.kv_cache or scheme.weights.number.kind != "int":
            continue
        assert transformers == ("yes" if scheme.weights.symmetric else number), name
        assert (vllm == "yes") is (scheme.weights.bits in (4, 8)), name


def test_caches_have_their_conditions(capsys):
    assert run(["recipes"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    said = {number: " ".join(words) for number, *words in rows.values() if number.startswith("(")}
    assert said[rows["kv-int8"][-2]] == "with an exact cache"
    assert said[rows["kv-int8"][-1]] == "on devices that run its Triton attention"
    for name in ("kv-fp8", "w4a16-gptq-kv-fp8"):
        assert "its cache is rounded" in said[rows[name][-2]]
        assert "FlashAttention 3" in said[rows[name][-1]]
