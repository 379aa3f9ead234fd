"""The part of a recipe that says what a run may use of the machine: `budget`."""

from __future__ import annotations

from quantkit.recipe.schemes import Part
from quantkit.recipe.sizes import Size


class BudgetPart(Part):
    """The most that a run may use; None: no limit. It changes how a run works, never what it writes.

    ram: peak resident memory of the process, in bytes. vram: memory of the GPU. disk: what is written into the output
    folder, with what a resumed run needs.
    """

    ram: Size | None = None
    vram: Size | None = None
    disk: Size | None = None
