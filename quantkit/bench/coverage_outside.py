"""Which types of the coverage run are not accepted for a reason in the world, not in quantkit; without torch."""

from __future__ import annotations

import re

LEAST_SHARE = 0.5  # of the matrices that has to be quantized, for a type to count as accepted

# What quantkit says when it refuses such a model, and how the report calls it.
_SAID = (
    (re.compile(r"is an encoder-decoder model"), "an encoder-decoder"),
    (
        re.compile(r"does not run on a text alone|Exactly 1 of pixel_values"),
        "reads no text without a picture, and calibration has none",
    ),
    (
        re.compile(r"transformers reads another model than it has written"),
        "transformers does not read what it writes",
    ),
)
# Types of which no forward reads a text alone, and what they are instead.
_TYPES = {
    "gemma4_assistant": "drafts for another model, whose keys and values it reads",
    "gemma4_unified_assistant": "drafts for another model, whose keys and values it reads",
    "musicgen": "an encoder-decoder from text to sound",
    "musicgen_melody": "an encoder-decoder from text to sound",
    "pi0": "gives the movements of a robot, not text",
}


def why_outside(model_type: str, reason: str) -> str | None:
    """What a type is that cannot be mended here; None if `reason` is quantkit's or the coverage run's own."""
    known = _TYPES.get(model_type)
    return known or next((told for pattern, told in _SAID if pattern.search(reason)), None)
