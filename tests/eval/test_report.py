"""The JSON's keys are a promise; the table says the same to people."""

import dataclasses

import pytest
from quantkit_eval import Fit, Report, table

ALONE = Report(
    tokens=62,
    windows=2,
    context=32,
    stride=32,
    text=["a.txt"],
    text_sha256="0" * 64,
    quantized=Fit(perplexity=8.0, perplexity_se=0.5, nll=2.0794, nll_se=0.0625),
)
PAIRED = dataclasses.replace(
    ALONE,
    original=Fit(perplexity=7.5, perplexity_se=None, nll=2.0149, nll_se=None),
    delta_nll=0.0645,
    delta_nll_se=0.002,
    kl_mean=0.01,
    kl_mean_se=0.001,
    kl_median=0.008,
    kl_p99=0.05,
    kl_p99_se=0.004,
    kl_max=0.2,
    kl_windows=2,
    top1_agreement=0.9375,
    top1_agreement_se=0.01,
)


def test_the_schema():
    assert list(PAIRED.to_json()) == [
        "schema",
        "tokens",
        "windows",
        "context",
        "stride",
        "text",
        "text_sha256",
        "quantized",
        "original",
        "delta_nll",
        "delta_nll_se",
        "kl_mean",
        "kl_mean_se",
        "kl_median",
        "kl_p99",
        "kl_p99_se",
        "kl_max",
        "kl_windows",
        "top1_agreement",
        "top1_agreement_se",
        "max_tokens",
        "stopped_early",
        "cache",
        "cache_step",
    ]
    assert PAIRED.to_json()["schema"] == "quantkit-eval/1"
    assert PAIRED.to_json()["quantized"] == {
        "perplexity": 8.0,
        "perplexity_se": 0.5,
        "nll": 2.0794,
        "nll_se": 0.0625,
    }
    assert list(ALONE.to_json()) == list(PAIRED.to_json())


def test_a_report_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALONE.tokens = 1


def test_the_table_of_one_model():
    assert table(ALONE).splitlines() == [
        "perplexity       8.0000 ± 0.5000",
        "tokens           62 in 2 windows",
        "context, stride  32, 32",
    ]


def test_the_table_of_a_comparison():
    lines = table(PAIRED).splitlines()
    assert lines[1].split() == ["baseline", "7.5000"]
    assert lines[2].endswith("0.06450 ± 0.00200")
    assert lines[3].endswith("0.01000 ± 0.00100")
    assert lines[4].endswith("0.00800 / 0.05000 / 0.20000")
    assert lines[5].endswith("0.9375 ± 0.0100")


@pytest.mark.parametrize(
    ("step", "told"), [(None, "two bits, a window at once"), (1, "two bits, 1 token(s) at a time")]
)
def test_the_table_says_how_the_cache_was_filled(step, told):
    lines = table(dataclasses.replace(PAIRED, cache="two bits", cache_step=step)).splitlines()
    assert told in lines[-1]
    assert "cache" not in table(PAIRED)
