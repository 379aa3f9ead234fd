"""Rates of a machine that does not exist, so that no test measures one."""

from quantkit.cost.rates import UNITS, Rates
from quantkit.device import cpu_name

PER_UNIT = {"start": 3.0, "open": 2.0, "solve": 1e-3, "call": 1e-4}


def rates(factor: float = 1.0) -> Rates:
    """Every unit takes a nanosecond, but for what is done once."""
    seconds = {name: {"1": PER_UNIT.get(name, 1e-9) * factor} for name in UNITS}
    return Rates(cpu_name(), 2, seconds)
