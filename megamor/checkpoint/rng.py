"""Random states of one rank: Python, NumPy, torch on the CPU and on this rank's GPU.

They are restored as they were when the number of ranks is the same. Otherwise there is no right state to restore, so
every rank draws a new one from (seed, step, rank): defined, repeatable, and different on every rank.
"""

from __future__ import annotations

import logging
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamor.checkpoint.layout import rng_path
from megamor.errors import CheckpointError

log = logging.getLogger("megamor.checkpoint")


def rng_states(world_size: int) -> dict[str, Any]:
    """This rank's random states, for `write_rng`."""
    legacy_state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = legacy_state
    states: dict[str, Any] = {
        "world_size": world_size,
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def write_rng(checkpoint: Path, states: Mapping[str, Any], *, rank: int) -> None:
    """Write the random states of `rank` into the checkpoint directory."""
    path = rng_path(checkpoint, rank)
    path.parent.mkdir(exist_ok=True)
    torch.save(states, path)


def restore_rng(checkpoint: Path, *, rank: int, world_size: int, seed: int, step: int) -> bool:
    """Restore this rank's random states; True if they are exactly those that were saved.

    After a change of world size, or from a CPU to a GPU, the states are drawn from (seed, step, rank) and it is logged.

    Raises:
        CheckpointError: the file of an unchanged world size can't be read.
    """
    path = rng_path(checkpoint, rank)
    if not path.exists():
        _reseed_loudly(f"there is none for rank {rank}", seed, step, rank)
        return False
    try:
        states = torch.load(path, map_location="cpu", weights_only=True)
        if states["world_size"] != world_size:
            _reseed_loudly(f"they are of {states['world_size']} ranks, not {world_size}", seed, step, rank)
            return False
        name, keys, *rest = states["numpy"]
        random.setstate(states["python"])
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(states["torch"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"can't restore the random states in {path}: {error}") from error
    if not torch.cuda.is_available():
        return True
    if "cuda" not in states:
        torch.cuda.manual_seed(_derived_seed(seed, step, rank))
        log.warning("the checkpoint has no GPU random state; drawn from seed %d, step %d, rank %d", seed, step, rank)
        return False
    torch.cuda.set_rng_state(states["cuda"])
    return True


def reseed(seed: int, step: int, rank: int) -> None:
    """Set all random states of this process as a function of (seed, step, rank)."""
    derived = _derived_seed(seed, step, rank)
    random.seed(derived)
    np.random.seed(derived % 2**32)
    torch.manual_seed(derived)  # GPUs too


def _derived_seed(seed: int, step: int, rank: int) -> int:
    words = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    return int(words[0]) >> 1  # torch takes signed 64 bits


def _reseed_loudly(reason: str, seed: int, step: int, rank: int) -> None:
    log.warning("random states not restored: %s; drawn from seed %d, step %d, rank %d", reason, seed, step, rank)
    reseed(seed, step, rank)
