"""Which package may import which: the table of docs/architecture.md, checked on every import, nested ones included."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Room of megamor -> rooms it may import, besides itself and `errors`.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "lock": set(),
    "files": {"lock"},
    "ranks": set(),
    "devices": set(),
    "progress": set(),
    "codec": set(),
    "config": set(),
    "routing": {"config"},
    "model": {"routing", "config"},
    "data": {"config", "files", "codec"},
    "corpus": {"data", "config", "files", "lock", "codec"},
    "optim": {"config"},
    "parallel": {"checkpoint", "config", "devices", "ranks"},
    "checkpoint": {"codec", "config", "files", "ranks"},
    "origin": {"checkpoint"},
    "metrics": {"config", "files", "progress"},
    "load": {"model", "routing", "checkpoint", "config", "interop", "codec", "files", "devices"},
    "evaluate": {"load", "model", "routing", "data", "checkpoint", "config", "files", "ranks", "codec"},
    "analysis": {
        "evaluate", "load", "model", "routing", "data", "checkpoint", "config", "files", "codec", "metrics", "origin",
    },
    "interop": {"model", "routing", "checkpoint", "config", "files", "lock", "codec"},
    "serve": {"load", "model", "routing", "checkpoint", "config", "codec"},
    "train": {
        "config", "routing", "model", "data", "optim", "parallel", "checkpoint", "metrics", "evaluate", "files",
        "ranks", "progress", "lock", "codec", "load", "interop", "devices",
    },
}  # fmt: skip
ALLOWED["session"] = {*ALLOWED["train"], "train"} - {
    "metrics", "files", "progress", "lock", "routing", "interop", "load",
}  # fmt: skip
ALLOWED["plan"] = ALLOWED["train"] - {"data", "evaluate", "codec", "interop", "load", "devices"}
ALLOWED["study"] = {
    "origin", "config", "model", "data", "corpus", "parallel", "metrics", "load", "evaluate", "train", "files",
    "progress", "codec", "devices",
}  # fmt: skip
ALLOWED["report"] = {"study", "metrics", "checkpoint", "config", "files", "progress"}
ALLOWED["bench"] = {*ALLOWED} - {"bench"}
ALLOWED["cli"] = {*ALLOWED}
# Modules of one room that must stay independent: folder -> what no file in it may import.
FORBIDDEN: dict[str, tuple[str, ...]] = {"megamor/serve/engine": ("megamor.serve.http",)}
LAZY = (
    "wandb", "trackio", "deepspeed", "transformers", "datasets", "lm_eval", "streamlit", "matplotlib", "spacy", "nltk",
)  # fmt: skip
# The interface that is copied into an export to Hugging Face; no module here imports it.
EXPORTED = Path("megamor/interop/modeling_megamor.py")


@dataclass(frozen=True)
class Import:
    """`target` is the dotted name with the imported name appended; `nested` says that it is inside a function."""

    target: str
    line: int
    nested: bool

    @property
    def package(self) -> str:
        return self.target.split(".")[0]


def imports_of(source: str, package: str = "") -> Iterator[Import]:
    """Every import of a module that lives in `package`; `import_module("x")` and `torch.distributed.x` count too."""
    yield from _walk(ast.parse(source), package, nested=False)


def _walk(node: ast.AST, package: str, nested: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        yield from (Import(target, child.lineno, nested) for target in _targets(child, package))  # type: ignore[attr-defined]
        inside = nested or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(child, package, inside)


def _targets(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*base, *filter(None, [node.module])])
        return [f"{module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func) and node.args:
        return [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []  # type: ignore[list-item]
    if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
        return ["torch.distributed"]
    return []


def breaches(path: Path, source: str) -> list[str]:
    """What the import rules forbid in the file at `path` (relative to the repository root)."""
    parts = path.with_suffix("").parts
    found = []
    for imported in imports_of(source, ".".join(parts[:-1])):
        reason = _outside_reason(path, imported)
        if parts[0] == "megamor" and len(parts) > 1:
            room = parts[1]
            reason = reason or _room_reason(path, room, imported) or _library_reason(room, path.name, imported)
        if reason:
            found.append(f"{path}:{imported.line}: imports {imported.target}: {reason}")
    return found


def _outside_reason(path: Path, imported: Import) -> str | None:
    if imported.package in ("pretrain", "tools"):
        return "scripts are not importable: use megamor.cli"
    from_a_room = path.parts[0] == "megamor" and path.parts[1] != "cli" and path.name != "__main__.py"
    if from_a_room and imported.target.startswith("megamor.cli"):
        return "nothing imports a command"
    for folder, modules in FORBIDDEN.items():
        if path.as_posix().startswith(folder) and imported.target.startswith(modules):
            return f"{folder} must not import {imported.target}"
    if imported.package in LAZY and not imported.nested and path != EXPORTED:
        return "an optional package: import it inside a function, so that others don't need it"
    return None


def _room_reason(path: Path, room: str, imported: Import) -> str | None:
    # The package's own imports are for type checkers; that it imports no room is tested in tests/unit/test_session.py.
    if imported.package != "megamor" or room in ("__main__", "__init__"):
        return None
    if room not in ALLOWED:
        return f"give megamor.{room} a row in ALLOWED and in docs/architecture.md"
    if imported.target == "megamor":
        return "name the room: `from megamor.room import ...`"
    other = imported.target.split(".")[1]
    if path.name == "__main__.py" and other == "cli":
        return None
    return f"not for {room}" if other in ALLOWED and other not in {room, "errors"} | ALLOWED[room] else None


def _library_reason(room: str, file: str, imported: Import) -> str | None:
    if room == "config" and imported.package not in {"megamor", "yaml", "pydantic"} | sys.stdlib_module_names:
        return "config has the standard library, yaml and pydantic only"
    if room == "model" and f"{imported.target}.".startswith("torch.distributed."):
        return "the model must not depend on processes"
    if room == "data" and file != "loader.py" and imported.package == "torch":
        return "in data only loader.py may import torch"
    return None


def files() -> list[Path]:
    """Every Python file that the rules apply to, relative to the repository root."""
    found = [*ROOT.glob("megamor/**/*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("pretrain.py")]
    return sorted(path.relative_to(ROOT) for path in found)


def test_no_import_breaks_the_table() -> None:
    found = [breach for path in files() for breach in breaches(path, (ROOT / path).read_text())]
    assert not found, "\n".join(found)


def test_the_documentation_shows_the_table() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|$", page.split("## Rooms")[1].split("\n## ")[0], re.MULTILINE)
    every = {"–": set[str](), "every room": {*ALLOWED}, "every room but cli": {*ALLOWED} - {"cli"}}
    shown = {room: every[cell] if cell in every else {*cell.split(", ")} for room, cell in rows}
    assert len(rows) == len(ALLOWED)
    assert {room: rooms - {room, "errors"} for room, rooms in shown.items()} == {
        room: rooms - {room, "errors"} for room, rooms in ALLOWED.items()
    }


@pytest.mark.parametrize("package", LAZY)
def test_an_optional_package_is_imported_in_one_file(package: str) -> None:
    importers = {
        str(path)
        for path in files()
        for item in imports_of((ROOT / path).read_text())
        if item.package == package and path != EXPORTED
    }
    assert len(importers) <= 1, f"{package} is imported in {sorted(importers)}"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megamor/model/a.py", "import torch.distributed as dist"),
        ("megamor/model/a.py", "from torch import distributed"),
        ("megamor/model/a.py", "import torch\ntorch.distributed.barrier()"),
        ("megamor/model/a.py", "def f():\n    from megamor.train import step"),
        ("megamor/model/a.py", "from ..data import loader"),
        ("megamor/model/a.py", "if True:\n    from megamor import parallel"),
        ("megamor/config/a.py", "import numpy"),
        ("megamor/data/a.py", "class A:\n    def f(self):\n        import torch"),
        ("megamor/evaluate/a.py", "from megamor.parallel import build_backend"),
        ("megamor/data/a.py", "from megamor.corpus.writer import ShardWriter"),
        ("megamor/serve/engine/a.py", "from megamor.serve.http.server import Server"),
        ("megamor/bench/a.py", "from megamor.cli import pretrain"),
        ("megamor/train/a.py", "from megamor.serve import engine"),
        ("megamor/unheard_of/a.py", "from megamor.config import Config"),
        ("megamor/train/a.py", "from megamor.cli.bench import main"),
        ("pretrain.py", "import tools.preprocess"),
        ("tools/a.py", "from pretrain import main"),
        ("megamor/metrics/a.py", "import wandb"),
        ("megamor/data/a.py", "import importlib\nimportlib.import_module('megamor.model')"),
    ],
)
def test_a_breach_is_found(path: str, source: str) -> None:
    assert len(breaches(Path(path), source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megamor/model/a.py", "import torch\nfrom megamor.model.b import c\nfrom megamor.errors import ConfigError"),
        ("megamor/model/__init__.py", "from . import blocks"),
        ("megamor/data/loader.py", "import torch"),
        ("megamor/metrics/a.py", "def f():\n    import wandb"),
        ("megamor/parallel/a.py", "import torch.distributed.checkpoint"),
        ("tools/a.py", "from megamor.cli.preprocess import main"),
        ("megamor/serve/__main__.py", "from megamor.cli.serve import main"),
        ("megamor/serve/http/a.py", "from megamor.serve.engine.request import Engine"),
        ("megamor/evaluate/a.py", "import datasets_of_ours"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert breaches(Path(path), source) == []
