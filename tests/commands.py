"""Commands that run inside the test process or a fork of it, and files that tests damage."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[[list[str]], None]


def status(command: Command, *arguments: object) -> int:
    """Exit status of `command`."""
    try:
        command([str(argument) for argument in arguments])
    except SystemExit as leaving:
        return int(str(leaving.code or 0))
    return 0


def refusal(capsys: pytest.CaptureFixture[str], command: Command, *arguments: object) -> str:
    """The message on stderr of a command that must exit with status 2."""
    capsys.readouterr()
    assert status(command, *arguments) == 2
    return capsys.readouterr().err


def in_child(action: Callable[[], Any]) -> int:
    """Run `action` in a forked process and return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(70)
    return os.waitpid(child, 0)[1]


def flip_bit(path: Path, position: int, bit: int = 1) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)
