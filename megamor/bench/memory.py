"""Peak memory of a training step, each case in a fresh process so that no allocator remembers another case."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from megamor.bench.cases import Case, TrainingStep, make_batch
from megamor.errors import TrainingError
from megamor.metrics import peak_memory, reset_peak_memory

_GIB = 2**30
_STEPS = 3
_RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Settings of glibc under which freed tensors leave the resident set at once, so that its peak is that of live ones."""


def step_memory(case: Case, device: torch.device, threads: int) -> int | None:
    """Bytes that training takes at its peak above the built model: gradients, AdamW moments and activations.

    Resident memory on a CPU, allocated memory on a GPU. None where the system can't reset a process's peak.

    Raises:
        TrainingError: the process died, most likely for want of memory.
    """
    saved = {name: os.environ.get(name) for name in _RETURN_FREED_MEMORY}
    os.environ.update(_RETURN_FREED_MEMORY)  # glibc reads them when the child starts
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_measure, case, device, threads).result()
    except BrokenProcessPool:
        raise TrainingError(
            f"the process that measures the memory of {case.name} died; lower train.micro_batch_size"
        ) from None
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _measure(case: Case, device: torch.device, threads: int) -> int | None:
    torch.set_num_threads(threads)
    step = TrainingStep(case, device)
    _load_libraries(step)
    batches = [make_batch(case.config, number, device) for number in range(_STEPS)]
    if not reset_peak_memory(device):
        return None
    before = peak_memory(device)["memory/peak_gib"]
    for batch in batches:
        step.run(*batch)
    after = peak_memory(device)["memory/peak_gib"]
    assert before is not None
    assert after is not None
    return round((after - before) * _GIB)


def _load_libraries(step: TrainingStep) -> None:
    """One pass over a few tokens, so that code and workspaces of the kernels are not counted as the step's."""
    inputs, labels = make_batch(step.case.config, 0, step.device)
    out = step.model(inputs[:1, :8], labels[:1, :8])
    out.loss_sum.backward()
    step.optimizer.zero_grad(set_to_none=True)
