"""One self-contained source file out of several modules of megamor.

An exported model must load where megamor isn't installed, and must not be a second implementation. So its code file is
put together from the very modules that training ran: their sources one after the other, in the order of their imports,
with imports from megamor taken out (what they name is in the same file) and all others gathered at the top.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

PACKAGE = "megamor"
ROOT = Path(__file__).parents[2]

Import = ast.Import | ast.ImportFrom


@dataclass
class Module:
    """A module's source, taken apart. `path` is relative to the directory that holds the package."""

    name: str
    path: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        """Syntax tree."""
        return ast.parse(self.source)

    def imports(self) -> Iterator[Import]:
        """Import statements at the top level."""
        return (node for node in self.tree.body if isinstance(node, ast.Import | ast.ImportFrom))

    def own_imports(self) -> Iterator[tuple[str, str]]:
        """(module, name) of everything imported from megamor."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                assert not any(_is_own(alias.name) for alias in node.names), f"{self.path}: import names, not modules"
            if isinstance(node, ast.ImportFrom) and _is_own(node.module or ""):
                assert node in self.tree.body, f"{self.path}:{node.lineno}: a nested import can't be taken out"
                assert all(alias.asname is None for alias in node.names), f"{self.path}:{node.lineno}: renames"
                yield from ((node.module or "", alias.name) for alias in node.names)

    @cached_property
    def definitions(self) -> set[str]:
        """Names that the module itself binds at the top level."""
        names = set()
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.For | ast.Try | ast.If):
                stored = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
                names |= {name.id for name in stored}
        return names - {"__all__"}


@cache
def find_module(name: str) -> Module:
    """The module with the dotted name `name`."""
    stem = ROOT.joinpath(*name.split("."))
    path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
    return Module(name, str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))


@dataclass
class Assembly:
    """Modules in an order in which each finds what it needs above it."""

    modules: dict[str, Module] = field(default_factory=dict)

    def add(self, name: str) -> None:
        """Add a module after everything that it imports from megamor."""
        if name in self.modules:
            return
        module = find_module(name)
        for package, imported in module.own_imports():
            home = defining_module(package, imported)
            if home != name:
                self.add(home)
        self.modules[name] = module

    def check_names(self) -> None:
        """No name may mean two things in one file."""
        owners: dict[str, str] = {}
        for module in self.modules.values():
            outside = {_bound(alias): _target(node, alias) for node in self._foreign(module) for alias in node.names}
            for name, owner in [*((name, module.name) for name in module.definitions), *outside.items()]:
                other = owners.setdefault(name, owner)
                assert other == owner, f"{name} is both {other} and {owner}: rename one of them"

    def header(self) -> str:
        """All imports from outside, each name once."""
        whole: set[str] = set()
        names: dict[str, set[str]] = {}
        for module in self.modules.values():
            for node in self._foreign(module):
                if isinstance(node, ast.Import):
                    whole.add(ast.unparse(node))
                else:
                    names.setdefault(node.module or "", set()).update(map(ast.unparse, node.names))
        return "\n".join(
            [*sorted(whole), *(f"from {home} import {', '.join(sorted(names[home]))}" for home in sorted(names))]
        )

    def _foreign(self, module: Module) -> Iterator[Import]:
        for node in module.imports():
            name = node.names[0].name if isinstance(node, ast.Import) else node.module or ""
            if not _is_own(name) and name != "__future__":
                yield node


def defining_module(module: str, name: str) -> str:
    """Where `name` is defined that `module` defines or, like a package's `__init__`, only passes on."""
    found = find_module(module)
    if name in found.definitions:
        return module
    for node in found.imports():
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return defining_module(node.module or "", name)
    raise AssertionError(f"{module} has no {name}")


def assemble(root: str, *, unwrap: tuple[str, ...], drop: tuple[str, ...] = ()) -> str:
    """Source of `root` and of everything that it needs from megamor.

    Of `root`, the functions named in `unwrap` are replaced by their bodies (without the final `return`), so that what
    they import and define stands at the top level; those in `drop` are left out.
    """
    assembly = Assembly()
    assembly.add(root)
    assembly.check_names()
    parts = ["from __future__ import annotations", assembly.header()]
    for module in assembly.modules.values():
        changed = (unwrap, drop) if module.name == root else ((), ())
        parts.append(section(module, *changed))
    text = "\n\n".join(parts) + "\n"
    return re.sub(r"\n{4,}", "\n\n\n", text)


def section(module: Module, unwrap: tuple[str, ...], drop: tuple[str, ...]) -> str:
    """A module's source under a heading, its docstring as a comment, without imports and `__all__`."""
    lines = module.source.splitlines()
    for node in reversed(module.tree.body):
        start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        replacement: list[str] | None = None
        if isinstance(node, ast.Import | ast.ImportFrom) or _is_all(node) or getattr(node, "name", None) in drop:
            replacement = []
        elif isinstance(node, ast.FunctionDef) and node.name in unwrap:
            replacement = _body(node, lines)
        elif node is module.tree.body[0] and ast.get_docstring(module.tree) is not None:
            replacement = [f"# {line}".rstrip() for line in (ast.get_docstring(module.tree) or "").splitlines()]
        if replacement is not None:
            lines[start - 1 : node.end_lineno] = replacement
    heading = f"# {'-' * 20} {module.path} {'-' * (96 - len(module.path))}"
    return "\n\n" + "\n".join([heading, *lines]).rstrip()


def _body(function: ast.FunctionDef, lines: list[str]) -> list[str]:
    """Lines of a function's body, dedented, without its docstring and final return."""
    statements = function.body[1:] if ast.get_docstring(function) is not None else function.body
    assert isinstance(statements[-1], ast.Return)
    end = statements[-2].end_lineno
    return textwrap.dedent("\n".join(lines[statements[0].lineno - 1 : end])).splitlines()


def _is_own(name: str) -> bool:
    return name.split(".")[0] == PACKAGE


def _is_all(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


def _bound(alias: ast.alias) -> str:
    return alias.asname or alias.name.split(".")[0]


def _target(node: Import, alias: ast.alias) -> str:
    """What an imported name means: `import a.b` binds `a` alone, `import a.b as c` binds all of it."""
    if isinstance(node, ast.ImportFrom):
        return f"{node.module}.{alias.name}"
    return alias.name if alias.asname else alias.name.split(".")[0]
