"""The wheel: what it contains, and that it works without a checkout of the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

from megamor import __version__
from megamor.config import config_to_yaml
from megamor.metrics import read_jsonl
from tests.resume.runs import tiny_run

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    """Run a program outside this checkout and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout, because the build leaves files behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("megamor", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "dist", ".", cwd=source)
    (built,) = (source / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel and the libraries of this one, but without this checkout."""
    home = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home)
    # Added after the installation, or pip would find an editable megamor there and consider it installed. Python
    # ignores .pth files in a directory that was itself added by one, so the editable megamor can't be imported.
    (site_packages,) = home.glob("lib/python*/site-packages")
    (site_packages / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return home / "bin"


def test_the_wheel_contains_the_package_alone(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        assert archive.read("megamor/cli/quickstart.yaml") == (ROOT / "configs" / "quickstart.yaml").read_bytes()
    metadata = f"megamor-{__version__}.dist-info/"
    package = {name for name in names if not name.startswith(metadata)}
    files = (path for path in (ROOT / "megamor").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert package == {path.relative_to(ROOT).as_posix() for path in files}
    assert {"megamor/py.typed", f"{metadata}licenses/LICENSE"} <= names


def test_the_installed_command_trains(installed: Path, tmp_path: Path) -> None:
    found = run(installed / "python", "-c", "import megamor; print(megamor.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(installed.parent)
    assert run(installed / "megamor", "--version", cwd=tmp_path) == f"megamor {__version__}\n"
    assert run(installed / "megamor", "--help", cwd=tmp_path).startswith("usage: megamor")
    config = tiny_run(tmp_path / "home", max_steps=2)
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    run(installed / "megamor", "pretrain", "--config", "run.yaml", cwd=tmp_path)
    records = read_jsonl(Path(config.run.dir) / config.run.name / "metrics.jsonl")
    assert [record["step"] for record in records if "train/loss" in record] == [1, 2]


@pytest.mark.timeout(900)
def test_the_installed_quickstart_runs(installed: Path, tmp_path: Path) -> None:
    assert "done in" in run(installed / "megamor", "quickstart", "--short", cwd=tmp_path)
    assert (tmp_path / "runs" / "quickstart" / "depth.svg").exists()
