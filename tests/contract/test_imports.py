"""Who may import whom: the table of docs/architecture.md, checked on every import statement, nested ones included."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Room of megamor -> rooms it may import, besides itself and `errors`.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": set(),
    "routing": {"config"},
    "model": {"routing", "config"},
    "data": {"config"},
    "optim": {"config"},
    "parallel": {"config"},
    "checkpoint": {"config"},
    "metrics": {"config"},
    "load": {"model", "checkpoint", "config", "interop"},
    "evaluate": {"load", "model", "routing", "data", "checkpoint", "config"},
    "analysis": {"load", "model", "routing", "data", "checkpoint", "config"},
    "generate": {"load", "model", "routing", "data", "checkpoint", "config", "evaluate"},
    "interop": {"model", "routing", "checkpoint", "config"},
    "origin": {"checkpoint"},
    "serve": {"load", "model", "routing", "checkpoint", "config", "origin"},
    "train": {
        "config", "routing", "model", "data", "optim", "parallel", "checkpoint", "metrics", "evaluate",
    },
}  # fmt: skip
LAZY = ("wandb", "deepspeed", "transformers", "datasets", "lm_eval")


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
            reason = reason or _room_reason(room, imported) or _library_reason(room, path.name, imported)
        if reason:
            found.append(f"{path}:{imported.line}: imports {imported.target}: {reason}")
    return found


def _outside_reason(path: Path, imported: Import) -> str | None:
    if imported.package == "pretrain" or (imported.package == "tools" and path.parts[0] != "tools"):
        return "entry points are for nobody to import"
    if imported.package in LAZY and not imported.nested:
        return "only inside a function, so that nobody needs it who doesn't use it"
    return None


def _room_reason(room: str, imported: Import) -> str | None:
    if room == "__init__" and imported.package == "megamor":
        return "the package itself imports no room"
    if imported.package != "megamor" or room == "__init__":
        return None
    if room not in ALLOWED:
        return f"give megamor.{room} a row in ALLOWED and in docs/architecture.md"
    if imported.target == "megamor":
        return "name the room: `from megamor.room import ...`"
    other = imported.target.split(".")[1]
    return f"not for {room}" if other in ALLOWED and other not in {room, "errors"} | ALLOWED[room] else None


def _library_reason(room: str, file: str, imported: Import) -> str | None:
    if room == "config" and imported.package not in {"megamor", "yaml"} | sys.stdlib_module_names:
        return "config has the standard library and yaml only"
    if room == "model" and f"{imported.target}.".startswith("torch.distributed."):
        return "the model knows nothing of processes"
    if room == "data" and file != "loader.py" and imported.package == "torch":
        return "in data only loader.py knows torch"
    return None


def files() -> list[Path]:
    """Every Python file that the rules are about, relative to the repository root."""
    found = [*ROOT.glob("megamor/**/*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("pretrain.py")]
    return sorted(path.relative_to(ROOT) for path in found)


def test_no_import_breaks_the_table() -> None:
    found = [breach for path in files() for breach in breaches(path, (ROOT / path).read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", LAZY)
def test_an_optional_package_is_imported_in_one_file(package: str) -> None:
    importers = {
        str(path) for path in files() for item in imports_of((ROOT / path).read_text()) if item.package == package
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
        ("megamor/evaluate/__main__.py", "from megamor.parallel import build_backend"),
        ("megamor/train/a.py", "from megamor.serve import engine"),
        ("megamor/unheard_of/a.py", "from megamor.config import Config"),
        ("megamor/train/a.py", "from tools.bench import main"),
        ("pretrain.py", "import tools.bench"),
        ("tools/a.py", "from pretrain import main"),
        ("megamor/metrics/a.py", "import wandb"),
        ("megamor/data/a.py", "import importlib\nimportlib.import_module('megamor.model')"),
        ("megamor/__init__.py", "from megamor.model import build_model"),
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
        ("tools/a.py", "from tools.b import c\nfrom megamor.train import step"),
        ("megamor/evaluate/a.py", "import datasets_of_ours"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert breaches(Path(path), source) == []
