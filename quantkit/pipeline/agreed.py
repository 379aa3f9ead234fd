"""The processes of one run agree on what it is made of."""

from __future__ import annotations

from typing import Any

from quantkit.calibration.ranks import Ranks
from quantkit.checkpoint.journal import differences
from quantkit.errors import DataError, ModelError


def agreed(ranks: Ranks, identity: dict[str, Any], windows: int) -> dict[str, Any]:
    """The identity of a run, which is that of every process, with their number where they share the calibration.

    identity: as this process found it; its "model" is None in all but one process of a machine, as they see the same
    files. ModelError naming what differs. windows: of calibration text; DataError if a process would have none.
    """
    if ranks.size == 1:
        return identity
    if 0 < windows < ranks.size:
        raise DataError(
            f"{windows} calibration windows are fewer than the {ranks.size} processes; raise calibration.samples or "
            "start fewer processes"
        )
    found = ranks.gather(identity)
    for rank, each in enumerate(found):
        known = each if each["model"] is not None else each | {"model": found[0]["model"]}
        if different := differences(found[0], known):
            raise ModelError(
                f"rank {rank} is about to do something else than rank 0; what differs (rank 0 -> rank {rank}):\n  "
                + "\n  ".join(different)
                + "\ngive every machine the same model, recipe, text and version of quantkit"
            )
    return found[0] | ({"processes": ranks.size} if windows else {})
