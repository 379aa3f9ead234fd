"""Texts and recipes for tests of calibration."""

import json

from quantkit import assets
from quantkit.calibration.text import token_windows
from quantkit.recipe.recipe import Calibration

LENGTH = 16


def words(count, start=0):
    return " ".join(f"number {i}" for i in range(start, start + count))


def calibration(*data, samples=4, length=LENGTH, seed=0):
    return Calibration(data=list(data), samples=samples, sequence_length=length, seed=seed)


def windows(tokenizer, *data, **keywords):
    return token_windows(calibration(*data, **keywords), tokenizer, assets.calibration_text())


def decoded(tokenizer, found):
    return [tokenizer.decode(row) for row in found.ids]


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)
