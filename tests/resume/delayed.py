"""Simulates a network file system on which the writes of other processes become visible late.

Inside `delayed_view(root, seconds)` this process doesn't see a path below `root` until `seconds` after it was created,
written or renamed, unless it did that itself. Only lookups are delayed: creating a path that exists already fails at
once and makes it visible, as a file server would.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class DelayedView:
    """Which paths below `root` this process sees."""

    def __init__(self, root: Path, seconds: float) -> None:
        self.root, self.seconds = os.path.realpath(root), seconds
        self.own: set[str] = set()
        """Paths that this process has created or seen."""
        self.hidden = 0
        self.lstat = os.lstat

    def absolute(self, path: Any) -> str | None:
        """`path` if it lies below the root."""
        if not isinstance(path, str | bytes | os.PathLike):
            return None  # a descriptor: it is open already
        found = os.path.abspath(os.fsdecode(path))
        return found if found.startswith(self.root + os.sep) else None

    def is_hidden(self, path: Any) -> bool:
        """Whether the path, or one of its parent directories, is too new to be seen."""
        current = self.absolute(path)
        while current is not None and current != self.root:
            if current not in self.own:
                try:
                    age = time.time() - self.lstat(current).st_ctime
                except OSError:
                    return False  # it doesn't exist: the real call raises the error
                if age < self.seconds:
                    self.hidden += 1
                    return True
                self.own.add(current)  # stays visible, although a directory's time changes with each new entry
            current = self.absolute(os.path.dirname(current))
        return False

    def created(self, path: Any) -> None:
        """Make a path visible, because this process created it or learned of it."""
        absolute = self.absolute(path)
        if absolute is not None:
            self.own.add(absolute)

    def check(self, path: Any) -> None:
        """Raise FileNotFoundError, as for a path that doesn't exist."""
        if self.is_hidden(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))

    def looking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function(path, ...)` to fail for hidden paths."""

        def look(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            self.check(path)
            return function(path, *args, **kwargs)

        return look

    def making(self, function: Callable[..., Any], result: int) -> Callable[..., Any]:
        """Wrap a function that creates the path given as its argument number `result`."""

        def make(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            finally:  # failing because it exists makes it visible too
                self.created(args[result])

        return make

    def opening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`open`: reading is a lookup, writing creates."""

        def open_(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "r" in mode and "+" not in mode:
                self.check(path)
            else:
                self.created(path)
            return function(path, mode, *args, **kwargs)

        return open_

    def listing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`os.scandir` leaves hidden entries out."""

        def scan(path: Any = ".") -> Entries:
            self.check(path)
            with function(path) as entries:
                return Entries(iter([entry for entry in entries if not self.is_hidden(entry.path)]))

        return scan


class Entries:
    """Result of `os.scandir`: an iterator that can be closed."""

    def __init__(self, entries: Iterator[os.DirEntry[str]]) -> None:
        self.entries = entries

    def __iter__(self) -> Entries:
        return self

    def __next__(self) -> os.DirEntry[str]:
        return next(self.entries)

    def __enter__(self) -> Entries:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close nothing: the entries were read at once."""


@contextmanager
def delayed_view(root: Path, seconds: float) -> Iterator[DelayedView]:
    """Delay when this process sees the changes of others below `root`."""
    view = DelayedView(root, seconds)
    replaced = {
        (os, "stat"): view.looking(os.stat),
        (os, "lstat"): view.looking(os.lstat),
        (os, "readlink"): view.looking(os.readlink),
        (os, "scandir"): view.listing(os.scandir),
        (os, "mkdir"): view.making(os.mkdir, 0),
        (os, "symlink"): view.making(os.symlink, 1),
        (os, "rename"): view.making(os.rename, 1),
        (os, "replace"): view.making(os.replace, 1),
        (io, "open"): view.opening(io.open),
        (builtins, "open"): view.opening(builtins.open),
    }
    originals = {(module, name): getattr(module, name) for module, name in replaced}
    for (module, name), function in replaced.items():
        setattr(module, name, function)
    try:
        yield view
    finally:
        for (module, name), function in originals.items():
            setattr(module, name, function)
