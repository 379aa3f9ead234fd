"""The predicted time of a run: what it counts, and how it grows."""

import made_up_rates
import pytest

from quantkit import assets
from quantkit.cost.time import PHASES, duration
from quantkit.models.headers import read_checkpoint
from quantkit.plan import build_plan
from quantkit.predict.memory import LEAST
from quantkit.predict.sizes import stored_bytes
from quantkit.recipe.recipe import load_recipe


def planned(name, *overrides, model=None):
    headers = read_checkpoint(model or assets.default_model())
    recipe = load_recipe(name, overrides)
    return recipe, build_plan(recipe, headers), headers


def predicted(name, *overrides, model=None, rates=None, **options):
    return duration(*planned(name, *overrides, model=model), rates or made_up_rates.rates(), **options)


def test_phases_add_up_and_every_rate_counts_in_proportion():
    found, doubled = predicted("w4a16-awq-gptq"), predicted("w4a16-awq-gptq", rates=made_up_rates.rates(2.0))
    assert list(found.phases) == [phase for phase in PHASES if phase in found.phases]
    assert found.total == pytest.approx(sum(found.phases.values()) - found.phases["evaluate"])
    for phase, seconds in found.phases.items():
        once = 1.0 if phase == "evaluate" else 0.0  # seconds that no rate stands for
        assert doubled.phases[phase] - once == pytest.approx(2 * (seconds - once))
    assert len(found.parts) == 9  # 8 blocks and what lies outside
    assert max(found.parts[:8]) == pytest.approx(min(found.parts[:7]), rel=0.05)


def test_rounding_counts_every_weight_once():
    recipe, plan, headers = planned("w4a16-rtn")
    found = duration(recipe, plan, headers, made_up_rates.rates())
    weights = sum(n * k for n, k in (layer.shape for layer in plan.layers))
    assert found.phases["quantize"] == pytest.approx(2e-9 * weights + 1e-3 * 4 * plan.n_blocks)
    written = sum(stored_bytes(plan, headers).values())
    assert found.phases["write"] == pytest.approx(1e-9 * (weights + written))
    assert not {"calibrate", "transform", "search"} & found.phases.keys()


@pytest.mark.parametrize("model", [assets.default_model(), assets.mixture_model()])
def test_calibration_grows_with_the_text_and_solving_does_not(model):
    half, whole = (predicted("w4a16-gptq", f"calibration.samples={n}", model=model).phases for n in (64, 128))
    assert whole["calibrate"] == pytest.approx(2 * half["calibrate"], rel=0.05)
    assert whole["quantize"] == half["quantize"]


def test_sweeps_are_as_many_as_asked_for():
    found = [predicted("w4a16-gptq", f"weights.algorithm.refine={n}").phases["quantize"] for n in (0, 2, 4)]
    assert found[2] - found[1] == pytest.approx(found[1] - found[0])
    assert found[1] > found[0]


def test_what_is_not_kept_is_computed_again():
    assert (
        predicted("w4a16-gptq", ways=LEAST).phases["calibrate"] > predicted("w4a16-gptq").phases["calibrate"]
    )


def test_a_search_counts_the_windows_that_there_are():
    few, many = (
        predicted("w4a16-smoothquant-plus", f"calibration.samples={n}").phases["search"] for n in (8, 64)
    )
    assert 2 < many / few < 8
    assert "search" not in predicted("w4a16-smoothquant-plus", "transforms.0.strength=0.5").phases


def test_a_run_without_a_model_class_has_a_time():
    assert predicted("w4a16-rtn", "model_free=true").total > 0
