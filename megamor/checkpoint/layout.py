"""Names of the files and directories of checkpoints. No other module spells them out.

checkpoints/
  latest -> step_00000200          relative symlink, moved atomically
  best -> step_00000100            the checkpoint with the lowest validation loss; only with `checkpoint.keep_best`
  validation.json                  validation loss by step, for `best`
  step_00000100/
  step_00000200/
    state/                         weights, moments and step counts: see `state`
    rng/rank_00000.pt              random states, one file for each rank
    config.yaml  tokenizer.json  end_of_text.json  chat_template.jinja  trainer.json
    manifest.json                  every other file with its size and SHA-256; a directory without it is no checkpoint
  set_aside/                       what a run left behind, kept for people; nothing here is ever resumed or deleted
    after_step_00000100/           checkpoints, losses and metrics after step 100, from which `checkpoint.resume_step`
      step_00000200/               started again
  .writing_step_00000300/          not published; deleted at the next start
  .replaced_step_00000200/         renamed to make way for a new checkpoint of the same step; deleted at the next start,
                                   or renamed back if there is no new one
  .deleting_step_00000100/         expired; deleted at the next start
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from megamor.codec import END_OF_TEXT_FILE as END_OF_TEXT_FILE

STATE_DIR = "state"
RNG_DIR = "rng"
CONFIG_FILE = "config.yaml"
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
TEXT_FILES = (TOKENIZER_FILE, END_OF_TEXT_FILE, CHAT_TEMPLATE_FILE)
"""How a model's texts are written. Each may be missing."""
TRAINER_FILE = "trainer.json"
MANIFEST_FILE = "manifest.json"
LATEST = "latest"
BEST = "best"
LOSSES_FILE = "validation.json"
CHECKPOINTS_DIR = "checkpoints"
SET_ASIDE = "set_aside"

WRITING_PREFIX = ".writing_"
REPLACED_PREFIX = ".replaced_"
DELETING_PREFIX = ".deleting_"
DRAFT_SUFFIX = "_draft"

# Zeros in front make names sort by step; more digits than eight are allowed, so that any step has a name.
_STEP_NAME = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    """Directory name of the checkpoint taken after `step` optimizer steps."""
    return f"step_{step:08d}"


def parse_step(name: str) -> int | None:
    """Step in the directory name of a published checkpoint, or None for any other name."""
    match = _STEP_NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def looks_like_checkpoint(directory: Path) -> bool:
    """Whether anything in `directory` belongs to a checkpoint, whole or damaged."""
    return any((directory / name).exists() for name in (STATE_DIR, RNG_DIR, TRAINER_FILE, MANIFEST_FILE))


def draft_of(path: Path) -> Path:
    """Where a new link or file is prepared before it replaces the one at `path`."""
    return path.with_name(f".{path.name}{DRAFT_SUFFIX}")


def rng_path(checkpoint: Path, rank: int) -> Path:
    """File with the random states of `rank`."""
    return checkpoint / RNG_DIR / f"rank_{rank:05d}.pt"


def published_steps(root: Path) -> list[int]:
    """Steps of the published checkpoints in `root`, ascending, damaged ones included."""
    if not root.is_dir():
        return []
    steps = (parse_step(entry.name) for entry in root.iterdir() if entry.is_dir() and not entry.is_symlink())
    return sorted(step for step in steps if step is not None)


def latest_step(root: Path) -> int | None:
    """Step that `latest` names, whether or not that checkpoint exists; None without a usable `latest`."""
    link = root / LATEST
    return parse_step(link.readlink().name) if link.is_symlink() else None


def by_preference(steps: Collection[int], latest: int | None) -> list[int]:
    """Published `steps`, best first: the one that `latest` names, then older ones, newest first.

    Steps above `latest` come last: a user may have moved `latest` back on purpose, to discard them.
    """
    return sorted(steps, key=lambda step: (latest is not None and step > latest, -step))
