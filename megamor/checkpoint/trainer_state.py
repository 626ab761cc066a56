"""`trainer.json`: everything a run must restore except tensors and random states. Plain JSON that a person can read."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from megamor.checkpoint.layout import TRAINER_FILE
from megamor.checkpoint.manifest import identity_sha256
from megamor.errors import CheckpointError
from megamor.files import read_json


@dataclass(frozen=True)
class TrainerState:
    """State of the training loop after `step` optimizer steps.

    Attributes:
        data: position in the data: `state_dict()` of the loader.
        components: `state_dict()` of every other object that changes during training, by name (guard window, …).
        flops, seconds: executed training FLOPs, and seconds of training (not of saving and evaluating), of the run so
            far. `flops` is None in checkpoints of versions that didn't count them.
        lr: learning rate of the last step.
        run_ids: id in each experiment tracker, by its name, so that a resumed run continues there.
        run_directory: where the run was, by which a copy is told from the original: see `directory_identity`.
        resumed_from: the last `checkpoint.resume_step` that the run followed.
        recursions: the most recursions that a growing schedule has reached; None without one.
        started_from: what the weights came from before this run: `kind` (init, branch, import, convert-depth, merge),
            `source`, `step` if it has one, `sha256` of its weights or manifest, and its own `started_from` if it has
            one. Empty for weights drawn at random.
        data_fingerprints: fingerprints of the data sets and the tokenizer, by name.
        code_revision, world_size, backend, versions: how the checkpoint was made. Shown to people; resuming doesn't
            depend on them.
    """

    step: int
    tokens_seen: int
    data: dict[str, Any]
    world_size: int
    backend: str
    components: dict[str, Any] = field(default_factory=dict)
    flops: float | None = None
    seconds: float = 0.0
    lr: float | None = None
    run_ids: dict[str, str] = field(default_factory=dict)
    run_directory: dict[str, Any] = field(default_factory=dict)
    resumed_from: int | None = None
    recursions: int | None = None
    started_from: dict[str, Any] = field(default_factory=dict)
    data_fingerprints: dict[str, str] = field(default_factory=dict)
    code_revision: str = "unknown"
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of `trainer.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, checkpoint: Path) -> TrainerState:
        """Read `trainer.json` of `checkpoint`.

        Raises:
            CheckpointError: it is missing, damaged, or written by a version with other fields.
        """
        path = checkpoint / TRAINER_FILE
        content = read_json(path)
        fields = dataclasses.fields(cls)
        required = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
        missing, unknown = required - content.keys(), content.keys() - {f.name for f in fields}
        if missing or unknown:
            raise CheckpointError(
                f"{path} is from another version of megamor: missing {sorted(missing)}, unknown {sorted(unknown)}"
            )
        return cls(**content)


def origin_of(kind: str, directory: Path) -> dict[str, Any]:
    """What `TrainerState.started_from` says of weights from `directory`.

    Raises:
        CheckpointError: `trainer.json` is damaged.
    """
    found: dict[str, Any] = {"kind": kind, "source": str(directory), "sha256": identity_sha256(directory)}
    if (directory / TRAINER_FILE).is_file():
        state = TrainerState.read(directory)
        found |= {"step": state.step} | ({"started_from": state.started_from} if state.started_from else {})
    return found


def describe_origin(started_from: Mapping[str, Any]) -> str:
    """`TrainerState.started_from`, which isn't empty, in words."""
    step = f"step {started_from['step']}, " if "step" in started_from else ""
    before = started_from.get("started_from")
    earlier = f", which started from {describe_origin(before)}" if before else ""
    return f"{started_from['source']} ({started_from['kind']}, {step}sha256 {started_from['sha256']}){earlier}"


def directory_identity(directory: Path) -> dict[str, Any]:
    """The path of an existing directory and its inode: a moved one keeps the inode, a copy has neither."""
    return {"path": str(directory.resolve()), "inode": directory.stat().st_ino}


def is_copy(directory: Path, saved: Mapping[str, Any]) -> bool:
    """Whether the checkpoints in the existing run directory `directory` were saved in another one, `saved`."""
    here = directory_identity(directory)
    return bool(saved) and all(saved.get(name) != here[name] for name in here)


def code_revision() -> str:
    """`git describe` of the checkout that this package is imported from, or `"unknown"` if there is none."""
    package = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--tags"]
    tracked = ["git", "-C", str(package.parent), "ls-files", "--error-unmatch", f"{package.name}/__init__.py"]
    try:
        # An installed package may be inside another project's repository, as a virtual environment usually is.
        subprocess.run(tracked, capture_output=True, check=True, timeout=10)
        return subprocess.run(command, capture_output=True, check=True, encoding="utf-8", timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def library_versions() -> dict[str, str]:
    """Versions of the libraries that numerical results depend on, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for library in ("megamor", "torch", "numpy", "deepspeed", "tokenizers"):
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return versions
