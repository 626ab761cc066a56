"""Custom routers: classes outside megamor that `router.target` names.

Importing a module runs it. So a class is imported only if its source shows that it is a `Router`, and a target that
comes with a checkpoint or an export only if this process has imported it already, or the user names it in
MEGAMOR_TRUSTED_ROUTERS as well.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import decode_source, resolve_name
from pathlib import Path

from megamor.config import Config, CustomRouterConfig
from megamor.config.segments import stages
from megamor.errors import ConfigError
from megamor.routing.router import Router

TRUSTED = "MEGAMOR_TRUSTED_ROUTERS"
"""Environment variable: targets that the user trusts, with commas between them."""


def import_router(target: str) -> Callable[[dict[str, float], int, int], Router]:
    """The router class named by `package.module:Class`.

    Raises:
        ConfigError: it can't be found, or isn't a `Router`; nothing of it was run.
    """
    module, _, name = target.partition(":")
    try:
        if not _is_trusted(target) and not _is_router(module, name):
            raise ConfigError(
                f"router.target = {target} is not a subclass of megamor.routing.Router as far as its source shows. It "
                f"was not imported; if it is one, set {TRUSTED}={target}"
            )
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, OSError, SyntaxError, RecursionError) as error:
        raise ConfigError(f"router.target = {target} can't be imported: {error}; set PYTHONPATH to find it") from error
    if not (isinstance(found, type) and issubclass(found, Router)):
        raise ConfigError(f"router.target = {target} is not a subclass of megamor.routing.Router")
    return found


def refuse_unknown_router(config: Config, origin: object) -> None:
    """Refuse a model with a custom router that `origin`, a checkpoint or an export, names and the user doesn't.

    Raises:
        ConfigError: naming the target and how to allow it.
    """
    for router in (stage.config.router for stage in stages(config)):
        if not isinstance(router, CustomRouterConfig) or _is_trusted(router.target):
            continue
        module, _, name = router.target.partition(":")
        if module not in sys.modules or not _is_router(module, name):
            raise ConfigError(
                f"{origin} asks for code: router.target = {router.target}. It was not imported; if you trust it, set "
                f"{TRUSTED}={router.target}"
            )


def _is_trusted(target: str) -> bool:
    return target in os.environ.get(TRUSTED, "").split(",")


def _is_router(module: str, name: str) -> bool:
    """Whether a class is a `Router` as far as it can be told without running anything.

    Raises:
        ModuleNotFoundError: there is no such module.
        OSError, SyntaxError: its source can't be read.
    """
    if module in sys.modules:
        found = getattr(sys.modules[module], "__dict__", {}).get(name)  # no `getattr`, which may run code
        return isinstance(found, type) and issubclass(found, Router)
    package, path = _find(module)
    nodes = list(ast.walk(ast.parse(decode_source(path.read_bytes())))) if path.suffix == ".py" else []
    homes: dict[str, str] = {}  # what the module calls something → its full name
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            home = resolve_name("." * node.level + (node.module or ""), package)
            homes |= {alias.asname or alias.name: f"{home}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            homes |= {alias.asname: alias.name for alias in node.names if alias.asname}
    own = {node.name: node.bases for node in nodes if isinstance(node, ast.ClassDef)}
    bases = [ast.unparse(base) for base in own[name]] if name in own else [name] * (name in homes)
    for first, dot, rest in (base.partition(".") for base in bases):
        if first in own and first != name and not dot:
            home, attribute = module, first
        else:
            home, _, attribute = (homes.get(first, first) + dot + rest).rpartition(".")
        if home and _is_router(home, attribute):
            return True
    return False


def _find(module: str) -> tuple[str, Path]:
    """The package that relative imports of `module` start from, and its file. Unlike `find_spec`, imports no parent."""
    path, origin, parts = None, None, module.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        specs = (finder.find_spec(name, path) for finder in sys.meta_path)
        spec = next((spec for spec in specs if spec), None)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        path, origin = spec.submodule_search_locations, spec.origin
    return (module if path is not None else ".".join(parts[:-1])), Path(origin or "")
