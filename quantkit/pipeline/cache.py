"""Where evaluations keep what the original model computed, and how much of it.

QUANTKIT_CACHE names the folder (default: quantkit/evaluation in XDG_CACHE_HOME, else in ~/.cache), QUANTKIT_CACHE_GB
its size at most (default 4; 0 keeps nothing). It can be deleted at any time.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from quantkit_eval.cache import Cache

from quantkit.device import cpu_name
from quantkit.errors import UserError

_GB = 4.0


def cache_limit() -> int:
    """Bytes the cache may take. UserError for a QUANTKIT_CACHE_GB that is no number of gigabytes."""
    wanted = os.environ.get("QUANTKIT_CACHE_GB") or str(_GB)
    try:
        size = float(wanted)
    except ValueError:
        size = -1
    if not 0 <= size < math.inf:
        raise UserError(f"QUANTKIT_CACHE_GB must be a number of gigabytes, 0 to keep nothing, got {wanted!r}")
    return int(size * 1e9)


def cache_folder() -> Path:
    """The folder of the cache; it need not exist."""
    named = os.environ.get("QUANTKIT_CACHE")
    if named:
        return Path(named)
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")  # a relative one is to be ignored, says the standard
    home = Path(os.path.expanduser("~"))  # a user without a home folder keeps the "~", in the working folder
    return (base if base.is_absolute() else home / ".cache") / "quantkit" / "evaluation"


def evaluation_cache(model_digest: str) -> Cache | None:
    """The cache for the model whose files have this digest, run on this processor; None if nothing is to be kept."""
    limit = cache_limit()
    return Cache(cache_folder(), limit, f"{model_digest} {cpu_name()}") if limit else None
