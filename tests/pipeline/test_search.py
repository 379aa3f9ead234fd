"""The search of SmoothQuant+: what it measures, what it chooses, what it keeps."""

import itertools
from pathlib import Path

import interrupt
import pytest
import torch

import quantkit
from quantkit import assets
from quantkit.calibration.text import token_windows
from quantkit.checkpoint.inspect import inspect_checkpoint
from quantkit.checkpoint.manifest import read_manifest
from quantkit.errors import RecipeError
from quantkit.models.tokenizer import open_tokenizer
from quantkit.pipeline.progress import Silent
from quantkit.pipeline.search import _Searching
from quantkit.recipe.recipe import TRANSFORMS, parse_recipe
from quantkit.transforms.smoothquant_plus import following, rounds

pytestmark = pytest.mark.usefixtures("steady")

PLUS = TRANSFORMS["smoothquant_plus"]
GRID = [step / 20 for step in range(21)]


@pytest.fixture(scope="module")
def found(arguments, tmp_path_factory):
    """(arguments, manifest) of one run with a search of all strengths, in several walks."""
    given = plus(arguments, tmp_path_factory.mktemp("plus") / "out", search="full", beside=8)
    return given, quantkit.quantize(**given).manifest


def plus(arguments, output, **options):
    """Arguments of a run whose transform has these options."""
    options = {"name": "smoothquant_plus", "search_windows": 4} | options
    return arguments("smoothquant_plus", output, transforms=[options])


def loss(given, output, strength, windows):
    """Mean KL to the original, on some windows, of a model that is quantized whole with one strength."""
    transforms = [{"name": "smoothquant_plus", "strength": strength}]
    whole = given | {"recipe": given["recipe"] | {"transforms": transforms}, "output": output}
    base, model = (quantkit.load(path) for path in (given["model"], quantkit.quantize(**whole).output))
    with torch.no_grad():
        p, q = (m(input_ids=windows, use_cache=False).logits.double().log_softmax(-1) for m in (base, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def calibration(given):
    """The windows of a run."""
    recipe = parse_recipe(given["recipe"])
    return token_windows(recipe.calibration, open_tokenizer(given["model"]), assets.calibration_text()).ids


@pytest.mark.parametrize("preset", ["W8A8", "W8A8_STATIC"])
def test_inputs_are_rounded_in_the_search_as_the_scheme_says(arguments, tmp_path, preset):
    """With 8 bits for the weights, nearly all that the model loses is in its inputs."""

    def least(given, **recipe):
        (search,) = quantkit.quantize(**given | {"recipe": given["recipe"] | recipe}).manifest.searches
        return min(t.loss for t in search.trials)

    weights = {"weights": {"preset": preset, "algorithm": {"name": "rtn", "range": "minmax"}}}
    both = least(plus(arguments, tmp_path / "both"), **weights)
    alone = least(plus(arguments, tmp_path / "alone"), **weights, inputs="none")
    assert 0 < 2 * alone < both


@pytest.mark.parametrize("strength", ["none", 0.0, 0.4, 1.0])
def test_a_trial_is_what_the_whole_quantized_model_loses(found, tmp_path, strength):
    given, manifest = found
    (search,) = manifest.searches
    trial = next(t for t in search.trials if t.strength == (None if strength == "none" else strength))
    wanted = loss(given, tmp_path / "out", strength, calibration(given)[: search.windows])
    assert trial.loss == pytest.approx(wanted, rel=1e-3)


def test_the_strength_with_the_least_loss_is_chosen_and_written(found):
    given, manifest = found
    (search,) = manifest.searches
    assert [t.strength for t in search.trials] == [None, *GRID]
    chosen = next(t for t in search.trials if t.strength == search.strength)
    assert all(chosen.loss <= t.loss for t in search.trials)
    assert (chosen.over_chosen, chosen.over_chosen_se) == (0, 0)
    assert all(t.over_chosen == pytest.approx(t.loss - chosen.loss) for t in search.trials)
    assert {entry["strength"] for entry in manifest.scaling} == {search.strength}
    assert read_manifest(Path(given["output"])).searches == manifest.searches
    assert inspect_checkpoint(given["output"])["searches"][0]["strength"] == search.strength


def test_how_many_walk_side_by_side_changes_nothing(found, arguments, tmp_path):
    _, manifest = found
    (search,) = manifest.searches
    coarse = quantkit.quantize(**plus(arguments, tmp_path / "out", beside=3)).manifest.searches[0]
    every = {t.strength: t.loss for t in search.trials}
    assert [every[t.strength] for t in coarse.trials] == [t.loss for t in coarse.trials]
    assert (search.walks, coarse.walks) == (3, 4)


def test_the_search_leaves_no_trace_in_what_is_quantized(found, arguments, tmp_path):
    """The files are those of a run that is given the strength."""
    _, manifest = found
    same = quantkit.quantize(**plus(arguments, tmp_path / "out", strength=manifest.searches[0].strength))
    assert same.manifest.files == manifest.files
    assert same.manifest.searches is None


def test_an_interrupted_run_does_not_search_again(found, arguments, tmp_path, monkeypatch):
    _, manifest = found

    class Stopped(Exception):
        pass

    def stop(self, index, name, note="", left=None):
        if index == 1:
            raise Stopped

    display = Silent()
    monkeypatch.setattr(Silent, "block", stop)
    again = plus(arguments, tmp_path / "out", search="full", beside=8)
    with pytest.raises(Stopped):
        quantkit.quantize(**again, progress=display)
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interrupt.SOURCE_DIGEST, str)
        patch.setattr(_Searching, "record", lambda self: pytest.fail("searched again"))
        assert quantkit.quantize(**again).manifest == manifest


def walked(config, losses):
    """The walks that a search with these losses makes, and the best strength it knows in the end."""
    known, walks = {}, []
    while strengths := following(config, known):
        walks.append(strengths)
        known |= {s: losses(s) for s in strengths}
    return walks, min(known, key=known.get)


@pytest.mark.parametrize("best", GRID)
def test_coarse_then_fine_finds_the_least_of_one_valley_in_two_walks(best):
    walks, found = walked(PLUS(name="smoothquant_plus"), lambda s: 2.0 if s is None else abs(s - best))
    assert found == best
    assert len(walks) == 2
    assert walks[0] == [None, 0, 0.25, 0.5, 0.75, 1]
    assert len(walks[1]) <= 4


@pytest.mark.parametrize("search", ["coarse", "full"])
@pytest.mark.parametrize("beside", [1, 4, 6, 64])
def test_a_walk_never_carries_more_than_asked_and_nothing_twice(search, beside):
    config = PLUS(name="smoothquant_plus", search=search, beside=beside)
    walks, found = walked(config, lambda s: 0.1 if s is None else 0.3 + abs(s - 0.5))
    assert found is None
    assert max(map(len, walks)) <= beside
    every = [s for strengths in walks for s in strengths]
    assert len(every) == len(set(every)) == (10 if search == "coarse" else 22)
    assert [len(w) for w in walks] == rounds(config)


def test_a_search_reports_how_far_it_is(arguments, tmp_path):
    shares = []

    class Display(Silent):
        def phase(self, name, share, left=None):
            if name == "searching":
                shares.append(share)

    quantkit.quantize(**plus(arguments, tmp_path / "out"), progress=Display())
    assert shares[0] == 0
    assert shares[-1] == 1
    assert all(a < b for a, b in itertools.pairwise(shares))
    assert len(shares) == 2 + 2 * 4  # begin and end; two walks of four blocks


def test_a_search_behind_another_transform_is_refused():
    recipe = {"weights": {"preset": "W4A16", "algorithm": "rtn"}, "transforms": ["awq", "smoothquant_plus"]}
    with pytest.raises(RecipeError, match="must be the first transform, got it behind awq"):
        parse_recipe(recipe)
    fixed = {"name": "smoothquant_plus", "strength": 0.5}
    assert parse_recipe(recipe | {"transforms": ["awq", fixed]}).transforms[1].strength == 0.5
