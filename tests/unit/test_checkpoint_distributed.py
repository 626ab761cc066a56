"""Saving with several gloo processes: the same weights are read back, and a failure on one rank stops all."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from megamor.checkpoint import CheckpointManager, load_weights, open_checkpoint, rng_states, verify, write_rng
from megamor.checkpoint.layout import LATEST, step_name
from megamor.checkpoint.manifest import read_manifest
from megamor.errors import CheckpointError
from tests.distributed.harness import RankFailed, run_ranks


def run(num_ranks: int, body: Callable[[int], None]) -> None:
    """Call `body(rank)` in forked processes that have joined a gloo group."""
    run_ranks(_joined, body, world_size=num_ranks)


def _joined(body: Callable[[int], None]) -> None:
    dist.init_process_group("gloo")
    body(dist.get_rank())


def full_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "embed.weight": torch.randn(10, 4, generator=generator),
        "block.weight": torch.randn(5, 3, generator=generator).bfloat16(),
    }


def write_sharded(directory: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = {f"model.{name}": distribute_tensor(t, mesh, [Shard(0)]) for name, t in full_weights().items()}
    dcp.save(sharded, checkpoint_id=directory / "state")


def write_random_states(directory: Path) -> object:
    write_rng(directory, rng_states(dist.get_world_size()), rank=dist.get_rank())
    return lambda: "what a writer returns need not be picklable"


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_sharded_save_reads_back_bitwise_in_one_process(tmp_path: Path, num_ranks: int) -> None:
    def body(rank: int) -> None:
        manager = CheckpointManager(tmp_path, keep_last=1)
        path = manager.save(7, [write_sharded, write_random_states], {"config.yaml": "a: 1\n"})
        assert manager.latest_valid() == path

    run(num_ranks, body)
    checkpoint = open_checkpoint(tmp_path, full=True)
    assert len(list((checkpoint.directory / "rng").iterdir())) == num_ranks
    loaded = checkpoint.weights()
    for name, tensor in full_weights().items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
    listed = set(read_manifest(checkpoint.directory))
    on_disk = {str(p.relative_to(checkpoint.directory)) for p in checkpoint.directory.rglob("*") if p.is_file()}
    assert listed == on_disk - {"manifest.json"}
    assert "state/.metadata" in listed


def fail_on_second_rank(directory: Path) -> None:
    if dist.get_rank() == 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (directory / "part").write_text("x")


def fail_inside_collective_save(directory: Path) -> None:
    """The second rank can't write its shard because a directory has its name."""
    if dist.get_rank() == 1:
        (directory / "state" / "__1_0.distcp").mkdir(parents=True)
    dist.barrier()
    write_sharded(directory)


@pytest.mark.parametrize("failing", [fail_on_second_rank, fail_inside_collective_save])
def test_failure_of_one_rank_raises_on_every_rank(tmp_path: Path, failing: Callable[[Path], None]) -> None:
    def body(rank: int) -> None:
        manager = CheckpointManager(tmp_path, keep_last=2)
        good = manager.save(1, [write_sharded], {})
        with pytest.raises(CheckpointError, match=r"failed on .*rank (0|1)") as caught:
            manager.save(2, [write_sharded, failing] if failing is fail_on_second_rank else [failing], {})
        if failing is fail_on_second_rank:
            assert "rank 1: OSError: [Errno 28] No space left on device" in str(caught.value)
        else:
            assert "(in rank 1's part)" in str(caught.value)
        assert manager.latest_valid() == good
        manager.save(3, [write_sharded], {})

    run(2, body)
    assert {entry.name for entry in tmp_path.iterdir()} == {LATEST, step_name(1), step_name(3)}
    verify(tmp_path / LATEST)


def test_a_bug_on_one_rank_does_not_hang_the_other(tmp_path: Path) -> None:
    def buggy(directory: Path) -> None:
        if dist.get_rank() == 1:
            raise KeyError("typo")

    def body(rank: int) -> None:
        manager = CheckpointManager(tmp_path, keep_last=1)
        with pytest.raises(KeyError if rank == 1 else CheckpointError, match="typo"):
            manager.save(1, [buggy], {})

    run(2, body)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise("R3")
def test_damage_is_found_by_whichever_rank_reads_the_file(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        manager = CheckpointManager(tmp_path, keep_last=3)
        steps = [manager.save(step, [write_sharded, write_random_states], {}) for step in (1, 2, 3)]
        if rank == 0:
            for name, step in (("rng/rank_00001.pt", 3), ("state/__0_0.distcp", 2)):
                path = tmp_path / step_name(step) / name
                whole = path.read_bytes()
                path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        dist.barrier()
        assert manager.latest_valid() == steps[0]

    run(2, body)


@pytest.mark.promise("R2")
def test_a_killed_rank_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        manager = CheckpointManager(tmp_path, keep_last=1)
        manager.save(1, [write_sharded], {})

        def die(directory: Path) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        manager.save(2, [write_sharded, die], {})

    with pytest.raises(RankFailed, match="died without an answer"):
        run(2, body)
    assert CheckpointManager(tmp_path, keep_last=1).latest_valid() == tmp_path / step_name(1)
    assert load_weights(tmp_path / LATEST).keys() == full_weights().keys()
    assert {entry.name for entry in tmp_path.iterdir()} == {LATEST, step_name(1)}


def test_own_files_are_recorded_even_when_others_can_not_see_them_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system, rank 0 sees one of rank 1's files truncated and another not at all."""
    from megamor.checkpoint import manifest

    real = manifest.list_sizes

    def delayed(directory: Path) -> dict[str, int]:
        sizes = real(directory)
        if dist.get_rank() == 0:
            sizes.pop("late_1")
            sizes["short_1"] = 1
        else:
            sizes.pop("late_0")
        return sizes

    def write(directory: Path) -> None:
        for kind in ("late", "short"):
            (directory / f"{kind}_{dist.get_rank()}").write_bytes(b"x" * 100)

    def body(rank: int) -> None:
        monkeypatch.setattr(manifest, "list_sizes", delayed)
        CheckpointManager(tmp_path, keep_last=1).save(1, [write], {})

    run(2, body)
    verify(tmp_path / LATEST)
    sizes = {name: record.size for name, record in read_manifest(tmp_path / LATEST).items()}
    assert sizes == {"late_0": 100, "late_1": 100, "short_0": 100, "short_1": 100}
