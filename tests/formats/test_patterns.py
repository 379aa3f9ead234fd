"""Patterns of a foreign config fit what Python's `re` says they fit, and none takes long."""

import random
import re

import pytest

from quantkit.formats.patterns import MAX_NAME, PatternError, matches

NAMES = [
    "", "a", "lm_head", "model.layers.0.mlp.down_proj", "model.layers.11.self_attn.q_proj", "layers.1x",
    "model.layers.0.mlp.gate", "a b", "A_b9", "aaaaab",
]  # fmt: skip
PATTERNS = [
    ".*", "lm_head", "re", r".*layers\.\d+\..*_proj$", r"model\.layers\.[0-9]\.mlp\.(down|up)_proj", ".*gate$", "^a+b$",
    "(?!lm_head).*", ".*(?=proj)", r".*\bmlp\b", r"\w+\s\w", "[^.]*$", "a{2,4}", "(a|aa)*b", "(a*)*b", "a*?b", ".+?x",
    r"[\d.]*", r"\D+\Z", "(?:a|b|)c*", "x?", "a{0}", "(a|b){3,}", r"\S+\B",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_fits_what_re_fits(pattern):
    for name in NAMES:
        assert matches(pattern, name) == bool(re.match(pattern, name)), name


def test_random_patterns_fit_what_re_fits():
    choice = random.Random(7).choice
    pieces = ["a", "b", ".", "a*", "b?", "(a|b)", "(ab)+", "a{1,2}", "[ab]", "$", "^"]
    for _ in range(400):
        text = "".join(choice(pieces) for _ in range(5))
        name = "".join(choice("ab.") for _ in range(6))
        assert matches(text, name) == bool(re.match(text, name)), (text, name)


BACKTRACK = ["(.*)*x$", "(a+)+$", "(a|a)*b", "(.*.*.*.*.*)*x", "((a*)*)*b", "(a{1,900}){1,900}b"]


@pytest.mark.parametrize("pattern", BACKTRACK)
def test_patterns_that_backtrack_end(pattern):
    assert not matches(pattern, "a" * 200 + "!")


@pytest.mark.parametrize(
    "pattern",
    ["(", "[z-a]", "*.mlp", r"(a)\1", "(?i)a", "(?<=a)b", "(?>a)", "a" * 3000, "(" * 500 + ")" * 500],
)
def test_what_cannot_be_used_is_refused(pattern):
    with pytest.raises(PatternError):
        matches(pattern, "aa")


def test_absurdly_long_names_fit_nothing():
    assert not matches(".*", "a" * (MAX_NAME + 1))
