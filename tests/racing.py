"""Threads that meet as often as the interpreter lets them."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def race(work: Callable[[int], object], threads: int = 8) -> None:
    """Run work(0), work(1), ... at once, a thread each, with a switch every 10 microseconds; raises what they raise."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
    finally:
        sys.setswitchinterval(interval)
