"""Random states of one rank: Python, NumPy, torch on the CPU and on this rank's GPU.

With an unchanged number of ranks they are restored exactly. With another number there are no states that would continue
the run, so every rank sets its own from (seed, step, rank): repeatable, and different on every rank.
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
        # A tensor instead of an array, so that the file can be read with `weights_only`, which runs no foreign code.
        "numpy": (str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def write_rng(checkpoint: Path, states: Mapping[str, Any], *, rank: int) -> None:
    """Write the random states of `rank` into the checkpoint directory."""
    path = rng_path(checkpoint, rank)
    path.parent.mkdir(exist_ok=True)
    torch.save(states, path)


def restore_rng(
    checkpoint: Path, *, rank: int, world_size: int, seed: int, step: int, draws_random: bool = True
) -> bool:
    """Restore this rank's random states; returns whether they are exactly the saved ones.

    After a change of world size, or from a CPU to a GPU, the states are set from (seed, step, rank). Rank 0 logs it,
    as a warning if training draws random numbers (`draws_random`).

    Raises:
        CheckpointError: the world size is unchanged and the file can't be read.
    """
    level = logging.WARNING if draws_random and rank == 0 else logging.DEBUG
    path = rng_path(checkpoint, rank)
    try:
        states = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
        if states is None or states["world_size"] != world_size:
            saved = states["world_size"] if states else "no"
            anew = f"random states set anew from seed {seed} and step {step}"
            log.log(level, "%s: saved by %s ranks, now %d", anew, saved, world_size)
            reseed(seed, step, rank)
            return False
        name, keys, *rest = states["numpy"]
        random.setstate(states["python"])
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(states["torch"])
    except pickle.UnpicklingError as error:  # torch's message is long, and advises to switch the check off
        raise CheckpointError(f"{path} holds something else than random states, which was not run") from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise CheckpointError(f"can't restore the random states in {path}: {error}") from error
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # training on the CPU, perhaps beside a GPU
        return True
    if "cuda" not in states:
        log.log(level, "GPU random state set anew from seed %d and step %d: saved on a CPU", seed, step)
        torch.cuda.manual_seed(_derived_seed(seed, step, rank))
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
    # Hashed, so that neighbouring steps and ranks don't get correlated streams, as seed + step + rank would.
    words = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    return int(words[0]) >> 1  # torch takes signed 64 bits
