"""CPU quotas of cgroup v1 and v2, read from a copy of the files that Linux shows."""

import pytest

from quantkit.cli.environment import prepare, threads_by_quota
from quantkit.cli.quota import cpu_quota
from quantkit.device import SPIN

V2 = "0::{path}\n"
V1 = "9:name=systemd:/x\n4:cpu,cpuacct:{path}\n3:memory:/\n0::/\n"


def machine(tmp_path, cgroup, mount, files):
    """A /proc/self and a cgroup file system; files: {folder below the mount: {name: text}}."""
    process, cgroups = tmp_path / "self", tmp_path / "cgroups"
    for folder, texts in files.items():
        (cgroups / folder).mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (cgroups / folder / name).write_text(text)
    process.mkdir()
    (process / "cgroup").write_text(cgroup)
    (process / "mountinfo").write_text(
        "22 1 8:1 / / rw - ext4 /dev/root rw\n" + mount.format(at=cgroups) + "\n"
    )
    return process


MOUNT_V2 = "30 22 0:26 / {at} rw,nosuid - cgroup2 cgroup2 rw"
MOUNT_V1 = "31 22 0:27 / {at} rw - cgroup cgroup rw,cpu,cpuacct"


def test_v2_takes_the_smallest_quota_on_the_way_up(tmp_path):
    files = {"a/b": {"cpu.max": "max 100000\n"}, "a": {"cpu.max": "150000 100000\n"}, ".": {}}
    assert cpu_quota(machine(tmp_path, V2.format(path="/a/b"), MOUNT_V2, files)) == 1.5


def test_v2_inside_a_namespace(tmp_path):
    files = {".": {"cpu.max": "50000 100000\n"}}
    assert cpu_quota(machine(tmp_path, V2.format(path="/"), MOUNT_V2, files)) == 0.5


def test_v1_with_the_hosts_path_of_a_container(tmp_path):
    mount = "31 22 0:27 /docker/1f {at} ro - cgroup cgroup rw,cpu,cpuacct"
    files = {".": {"cpu.cfs_quota_us": "300000\n", "cpu.cfs_period_us": "100000\n"}}
    assert cpu_quota(machine(tmp_path, V1.format(path="/docker/1f"), mount, files)) == 3


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"},
        {"cpu.cfs_quota_us": "x", "cpu.cfs_period_us": "0"},
        {"cpu.cfs_quota_us": "5", "cpu.cfs_period_us": "0"},
        {"cpu.max": "max\n"},
    ],
)
def test_no_quota_or_nonsense_is_no_bound(tmp_path, texts):
    assert cpu_quota(machine(tmp_path, V1.format(path="/"), MOUNT_V1, {".": texts})) is None


def test_no_cgroups_at_all(tmp_path):
    assert cpu_quota(tmp_path / "nowhere") is None


def test_this_machine_is_read_without_an_error():
    quota = cpu_quota()
    assert quota is None or quota > 0


@pytest.mark.parametrize(
    ("quota", "cpus", "threads"),
    [(None, 8, None), (8.0, 8, None), (16.0, 8, None), (1.5, 8, 2), (0.2, 8, 1), (3.0, 4, 3)],
)
def test_a_quota_bounds_the_threads(quota, cpus, threads):
    assert threads_by_quota(quota, cpus) == threads


def test_what_the_user_has_set_is_kept(monkeypatch):
    monkeypatch.setattr("quantkit.cli.environment.cpu_quota", lambda: 1.0)
    monkeypatch.setattr("quantkit.cli.environment.usable_cpus", lambda: 8)
    nothing: dict[str, str] = {}
    prepare(nothing, terminal=False)
    assert SPIN.items() <= nothing.items()
    assert nothing["OMP_NUM_THREADS"] == "1"
    assert nothing["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    mine = {"OMP_WAIT_POLICY": "active", "MKL_NUM_THREADS": "4", "TRANSFORMERS_VERBOSITY": "info"}
    after = dict(mine)
    prepare(after, terminal=True)
    assert mine.items() <= after.items()
    assert not SPIN.keys() & after.keys()
    assert "OMP_NUM_THREADS" not in after
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in after
