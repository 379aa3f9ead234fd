"""The wheel, installed into an environment of its own and used outside the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]  # one process builds it

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "quantkit", "recipes", "kernels", "eval")


def done(*command, cwd, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        else:
            shutil.copy(ROOT / name, copy / name)
    done(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=copy)
    return next((copy / "dist").glob("*.whl"))


def test_wheel_holds_every_source_file_and_all_data(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    for root, package in (
        (ROOT, "quantkit"),
        (ROOT / "kernels", "quantkit_kernels"),
        (ROOT / "eval", "quantkit_eval"),
    ):
        wanted = {str(file.relative_to(root)) for file in (root / package).rglob("*.py")}
        wanted |= {str(file.relative_to(root)) for file in (root / package).rglob("*.cpp")}
        wanted.add(f"{package}/py.typed")
        assert wanted <= held
    data = {f.relative_to(ROOT).as_posix() for f in (ROOT / "quantkit" / "assets").rglob("*") if f.is_file()}
    assert {name for name in data if "__pycache__" not in name} <= held
    assert {f"quantkit/_recipes/{file.name}" for file in (ROOT / "recipes").glob("*.yaml")} <= held


def test_installed_wheel_quantizes_by_name_from_any_folder(wheel, tmp_path):
    done(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    done(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp_path,
    )
    site = Path(
        done(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = done(
        python,
        "-c",
        "import quantkit, quantkit_eval, quantkit_kernels; print(quantkit.__file__)",
        cwd=tmp_path,
    )
    assert where.strip().startswith(str(tmp_path))
    quantkit = tmp_path / "env" / "bin" / "quantkit"
    assert "w4a16-gptq" in done(quantkit, "recipes", cwd=tmp_path)
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    told = done(quantkit, "quantize", "w4a16-rtn", "--no-eval", "--device", "cpu", cwd=tmp_path, **offline)
    assert "files: out/bookworm-8m-w4a16-rtn" in told
    assert (tmp_path / "out" / "bookworm-8m-w4a16-rtn" / "config.json").is_file()
