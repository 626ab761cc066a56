"""A rank that fails alone: it prints its error and ends with its own status; the others end soon, and say less."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamor.cli import pretrain
from megamor.config import Config, ParallelConfig, config_to_yaml
from megamor.errors import EXIT_LOST_RANK, DataError, telling_status
from megamor.model.blocks import Block
from megamor.parallel import joined_world
from megamor.parallel.backend import Backend
from megamor.ranks import Ranks, exit_status, report_errors_once
from megamor.train import Trainer
from megamor.train.evaluations import Evaluations
from megamor.train.run_state import RunCheckpoints
from megamor.train.watchdog import Watchdog
from tests.distributed.harness import run_ranks, start_ranks
from tests.resume.runs import directory_of, tiny_run

FAILING, STEP, SECONDS = 2, 3, 30.0


def fail() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def when_due(action: Callable[..., Any], step_of: Callable[[], int]) -> Callable[..., Any]:
    def changed(*arguments: Any, **settings: Any) -> Any:
        if step_of() == STEP:
            fail()
        return action(*arguments, **settings)

    return changed


def between_collectives(trainer: Trainer) -> None:
    trainer.run_micro_batches = when_due(trainer.run_micro_batches, lambda: trainer.progress.step)  # type: ignore[method-assign]


def inside_a_collective(trainer: Trainer) -> None:
    """In the backward pass, when some gradients are reduced and others are not."""

    def in_backward(gradient: Tensor) -> Tensor:
        if trainer.progress.step == STEP:
            fail()
        return gradient

    def watch(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if output[0].requires_grad:
            output[0].register_hook(in_backward)

    next(module for module in trainer.model.modules() if isinstance(module, Block)).register_forward_hook(watch)


def while_evaluating(trainer: Trainer) -> None:
    Evaluations.measure = when_due(Evaluations.measure, lambda: trainer.progress.step)  # type: ignore[method-assign]


def while_saving(trainer: Trainer) -> None:
    RunCheckpoints.save = when_due(RunCheckpoints.save, lambda: trainer.progress.step)  # type: ignore[method-assign]


def while_writing(trainer: Trainer) -> None:
    Backend.save = when_due(Backend.save, lambda: trainer.progress.step)  # type: ignore[method-assign]


def in_the_vote(trainer: Trainer) -> None:
    """The others wait for this rank, as they would on a GPU, which doesn't notice that it is gone."""
    trainer.loader.next_step = when_due(trainer.loader.next_step, lambda: trainer.progress.step)  # type: ignore[method-assign]


def train(config: Config, spoil: Callable[[Trainer], None], output: Path) -> None:
    """One rank of `megamor pretrain`, in this process; `spoil` on one rank."""
    file = os.open(output / f"rank_{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    if int(os.environ["RANK"]) == FAILING:
        post_init = Trainer.__post_init__

        def spoiled(trainer: Trainer) -> None:
            post_init(trainer)
            spoil(trainer)

        Trainer.__post_init__ = spoiled  # type: ignore[method-assign]
    (output / "config.yaml").write_text(config_to_yaml(config))
    pretrain.main(["--config", str(output / "config.yaml")])


def statuses(function: Callable[..., Any], *arguments: Any, world_size: int = 4, seconds: float = SECONDS) -> list[int]:
    """Exit statuses of all ranks, which must all end by themselves in time."""
    ranks = start_ranks(function, *arguments, world_size=world_size)
    deadline = time.monotonic() + seconds
    try:
        for process, _ in ranks:
            process.join(max(0.1, deadline - time.monotonic()))
        assert all(process.exitcode is not None for process, _ in ranks), "in bounded time"
        return [int(process.exitcode or 0) for process, _ in ranks]
    finally:
        for process, receiver in ranks:
            process.kill()
            process.join()
            receiver.close()


@pytest.mark.promise("R24")
@pytest.mark.parametrize(
    ("place", "settings"),
    [
        (inside_a_collective, {}),
        *(
            pytest.param(place, settings, marks=pytest.mark.slow)
            for place, settings in [
                (between_collectives, {}),
                (while_evaluating, {"eval_every": STEP}),
                (while_saving, {}),
                (while_writing, {}),
                (in_the_vote, {"backend": "ddp"}),
                (inside_a_collective, {"backend": "ddp"}),
            ]
        ),
    ],
)
def test_a_rank_that_fails_ends_the_run_with_its_status(
    tmp_path: Path, place: Callable[[Trainer], None], settings: dict[str, Any]
) -> None:
    config = tiny_run(tmp_path, **settings)
    if place in (while_saving, while_writing):
        config = Config(**{**vars(config), "checkpoint": type(config.checkpoint)(every_steps=STEP)})
    found = statuses(train, config, place, tmp_path)
    assert found == [EXIT_LOST_RANK, EXIT_LOST_RANK, 1, EXIT_LOST_RANK]
    assert telling_status(found) == 1
    said = (tmp_path / f"rank_{FAILING}").read_text()
    assert f"rank {FAILING}: Traceback" in said
    assert "OutOfMemoryError: CUDA out of memory" in said
    for rank in {0, 1, 3}:
        said = (tmp_path / f"rank_{rank}").read_text()
        assert f"rank {rank}: another rank has exited, and its output says why" in said
        assert "Traceback" not in said
    assert not (directory_of(config) / "checkpoints.lock").exists()


def wait_as_on_a_gpu(config: Config, output: Path) -> None:
    """Rank 1 fails and waits for something that never comes. Rank 0 doesn't notice, but its watchdog does."""
    from megamor.train import watchdog

    watchdog.CLEANUP_SECONDS = 1.0
    rank = int(os.environ["RANK"])
    stuck = lambda *arguments: time.sleep(600)  # noqa: E731
    if rank == 0:
        Trainer.run_micro_batches = stuck  # type: ignore[method-assign, assignment]
    else:
        Trainer.run_micro_batches = lambda *arguments: fail()  # type: ignore[method-assign, assignment, return-value]
        RunCheckpoints.close = stuck  # type: ignore[method-assign, assignment]
    train(config, lambda trainer: None, output)


@pytest.mark.promise("R24")
def test_ranks_that_notice_nothing_are_ended_too(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, hang_timeout_seconds=8.0 * 60)
    began = time.monotonic()
    assert statuses(wait_as_on_a_gpu, tiny_run(tmp_path, hang_timeout_seconds=16.0), tmp_path, world_size=2) == [76, 1]
    assert time.monotonic() - began < SECONDS
    assert "rank 1: Traceback" in (tmp_path / "rank_1").read_text()
    assert "another one has failed: rank 1: OutOfMemoryError" in (tmp_path / "rank_0").read_text()
    assert (directory_of(config) / "heartbeats" / "failed.txt").exists()  # and doesn't end the next launch:
    assert statuses(train, config, lambda trainer: None, tmp_path, world_size=2) == [0, 0]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2"), 76),
        (dist.DistBackendError("ncclRemoteError: A call failed possibly due to ... remote process exited"), 76),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), 76),
        (torch.OutOfMemoryError("CUDA out of memory"), 1),
        (dist.DistBackendError("NCCL error: unhandled cuda error"), 1),
        (ValueError("Connection closed by peer"), 1),
        (ConnectionResetError("Connection reset by peer"), 1),
        (DataError("x"), 2),
        (SystemExit(75), 75),
        (SystemExit("text"), 1),
        (SystemExit(), 0),
        (SystemExit(-1), 255),
        (SystemExit(2**40 + 3), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_statuses(error: BaseException, status: int) -> None:
    assert exit_status(error) == status


def test_a_rank_that_lost_another_one_does_not_say_that_it_failed(tmp_path: Path) -> None:
    for error, says in ((RuntimeError("Connection closed by peer"), False), (ValueError("boom"), True)):
        watchdog = Watchdog(tmp_path, 3, timeout=600.0)
        watchdog.fail(error)
        assert watchdog._exit_timer is not None
        watchdog.__exit__(None, None, None)
        assert (tmp_path / "heartbeats" / "failed.txt").exists() == says
    assert (tmp_path / "heartbeats" / "failed.txt").read_text() == "rank 3: ValueError: boom"


def test_a_failure_of_an_earlier_launch_ends_nobody(tmp_path: Path) -> None:
    watchdog, failed = Watchdog(tmp_path, 0, timeout=600.0), tmp_path / "heartbeats" / "failed.txt"
    watchdog._write_heartbeat(0.0)
    began = (tmp_path / "heartbeats" / "rank_0.json").stat().st_mtime
    assert watchdog._failure_elsewhere() is None
    failed.write_text("rank 1: ValueError: boom")
    for later, found in ((-1, None), (0, failed.read_text()), (1, failed.read_text())):
        os.utime(failed, (began + later, began + later))
        watchdog._write_heartbeat(0.0)
        assert watchdog._failure_elsewhere() == found


def test_the_first_cause_decides() -> None:
    error = RuntimeError("Connection closed by peer")
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    assert exit_status(error) == 1


def sockets(in_background: bool) -> int:
    """Sockets of this rank in a run's process group and what else it communicates through, all in use."""
    with joined_world(ParallelConfig(backend="ddp")):
        ranks = Ranks.current(in_background=in_background)
        with report_errors_once():
            ranks.gather(0)
            dist.all_reduce(torch.ones(1))
        targets = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        ranks.gather(0)  # nobody leaves before all have counted
        return sum(str(target).startswith("socket:") for target in targets)


@pytest.mark.promise("R24")
@pytest.mark.parametrize("in_background", [False, True])
def test_each_rank_has_one_connection_to_each_other_one(in_background: bool) -> None:
    """Two with saves in the background. Rank 0 has one more, as it holds the store in which the ranks meet."""
    few, many = (run_ranks(sockets, in_background, world_size=size) for size in (4, 8))
    each = 1 + in_background
    assert [b - a for a, b in zip(few, many, strict=False)] == [4 * (each + 1), *[4 * each] * 3]
    assert max(many) < 8 * (each + 1) + 10


@pytest.mark.slow
def test_64_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(run_ranks(sockets, False, world_size=64)) < 2 * 64 + 10
