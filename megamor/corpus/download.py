"""Files from the web: resumed where they broke off, checked, and under their name only when complete."""

from __future__ import annotations

import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from megamor.errors import DataError

TIMEOUT_SECONDS = 60.0
_BLOCK = 2**20
_WITHOUT_NETWORK = "check the network, or give a local copy with --from PATH"


def read_json(url: str) -> Any:
    """What `url` answers. Raises DataError naming it."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            return json.load(response)
    except (OSError, HTTPException, ValueError) as error:
        raise _failure(url, error) from error


def download(url: str, path: Path, check: Callable[[Path], None], advance: Callable[[int], None]) -> None:
    """Write what `url` answers to `path`, unless it is there. `advance` is told of bytes as they come.

    An earlier attempt's `.partial` file is continued if the server can. `check` gets the complete file, still under
    that name, and raises DataError if it is not the right one; it is then removed. Raises DataError naming the URL.
    """
    if path.exists():
        advance(path.stat().st_size)
        return
    partial = path.with_name(path.name + ".partial")
    done = partial.stat().st_size if partial.exists() else 0
    try:
        response = _open(url, done)
        if response is None:
            advance(done)
        else:
            with response:
                _fill(response, partial, done, advance)
    except (OSError, HTTPException) as error:
        raise _failure(url, error) from error
    try:
        check(partial)
    except DataError:
        partial.unlink()
        raise
    os.replace(partial, path)


def _open(url: str, done: int) -> HTTPResponse | None:
    """The answer from byte `done` on, or from the start if the server can't; None if nothing is left to send."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # the attempt before broke off between the last byte and the check
            return None
        raise


def _fill(response: HTTPResponse, partial: Path, done: int, advance: Callable[[int], None]) -> None:
    if response.status != 206:
        done = 0
    advance(done)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "ab") as file:
        file.truncate(done)
        came = 0
        while block := response.read(_BLOCK):
            file.write(block)
            came += len(block)
            advance(len(block))
        file.flush()
        os.fsync(file.fileno())
    expected = int(response.headers.get("Content-Length") or came)
    if came < expected:
        raise HTTPException(
            f"the connection broke after {done + came} of {done + expected} bytes; run it again to go on"
        )


def git_id_of_file(path: Path) -> str:
    """The id that git has for the contents of a file."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    digest.update(path.read_bytes())
    return digest.hexdigest()


def _failure(url: str, error: Exception) -> DataError:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return DataError(f"{url} can't be fetched: {reason}; {_WITHOUT_NETWORK} (nothing was put in its place)")
