"""How many processors' worth of time a container lets this process use, from cgroup v1 or v2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


def cpu_quota(process: Path = Path("/proc/self")) -> float | None:
    """The smallest CPU quota of the process's cgroup and the groups it lies in, in processors; None without one.

    v2: `cpu.max` holds "150000 100000" (microseconds of CPU time per period) or "max 100000"; v1: the files
    `cpu.cfs_quota_us` (-1: no limit) and `cpu.cfs_period_us`. process: the folder with `cgroup` and `mountinfo`.
    """
    try:
        groups = (process / "cgroup").read_text()
        mounts = (process / "mountinfo").read_text()
    except OSError:
        return None
    quotas = []
    for folder in _folders(groups, mounts):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota = _read(folder)
            if quota is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _folders(groups: str, mounts: str) -> Iterator[Path]:
    """The cgroup's folder and those above it up to the mount, in every hierarchy that controls CPU time."""
    for line in groups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        unified = number == "0" and not controllers
        if not unified and "cpu" not in controllers.split(","):
            continue
        for root, mount in _mounts(mounts, unified):
            # Without a cgroup namespace of its own a container sees the host's path, and its mount begins there.
            inside = path.removeprefix(root.rstrip("/")) if path.startswith(root) else "/"
            folder = mount / inside.strip("/")
            yield from (folder, *(above for above in folder.parents if above.is_relative_to(mount)))


def _mounts(mounts: str, unified: bool) -> Iterator[tuple[str, Path]]:
    """(root inside the hierarchy, where it is mounted) of v2, or of v1's hierarchy with the controller `cpu`."""
    for line in mounts.splitlines():
        fields, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        if kind == ("cgroup2" if unified else "cgroup"):
            parts = fields.split(" ")
            if len(parts) > 4 and (unified or "cpu" in options.split(" ")[-1].split(",")):
                yield parts[3], Path(parts[4])


def _read(folder: Path) -> float | None:
    """The quota that one cgroup sets, in processors; None if it sets none."""
    new = folder / "cpu.max"
    if new.exists():
        quota, period = new.read_text().split()
    else:
        quota = (folder / "cpu.cfs_quota_us").read_text()
        period = (folder / "cpu.cfs_period_us").read_text()
    if quota.strip() == "max" or int(quota) <= 0:
        return None
    return int(quota) / int(period)
