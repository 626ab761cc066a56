"""Every backend reads what any other wrote, with any number of processes: weights and moments are bit-equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megamor.checkpoint.state import write_state
from megamor.config import Config
from megamor.parallel import zero_config
from megamor.parallel.slices import Slices, boxes_of_range
from megamor.parallel.state import copy_to_host
from tests.distributed.harness import run_ranks
from tests.distributed.runs import LOSS_FREE, digest, preload_deepspeed, run_and_save, save, start, stored_tensors, tiny

CHAIN = [
    ("zero 1", tiny("deepspeed", router=LOSS_FREE, zero_stage=1), 3),
    ("fsdp2", tiny("fsdp2", router=LOSS_FREE), 2),
    ("zero 3", tiny("deepspeed", router=LOSS_FREE, zero_stage=3), 3),
    ("single", tiny("single", router=LOSS_FREE), 1),
    ("zero 2", tiny("deepspeed", router=LOSS_FREE, zero_stage=2), 4),
    ("ddp", tiny("ddp", router=LOSS_FREE), 2),
    ("hsdp 2 x 2", tiny("fsdp2", router=LOSS_FREE, shard_degree=2), 4),
    ("zero 0", tiny("deepspeed", router=LOSS_FREE, zero_stage=0), 2),
    ("fsdp2 on three", tiny("fsdp2", router=LOSS_FREE), 3),
    ("zero 3 on one", tiny("deepspeed", router=LOSS_FREE, zero_stage=3), 1),
    ("zero 1 in bf16", tiny("deepspeed", router=LOSS_FREE, zero_stage=1, precision="bf16"), 2),
    ("zero 3 in bf16", tiny("deepspeed", router=LOSS_FREE, zero_stage=3, precision="bf16"), 2),
    ("fsdp2 in bf16", tiny("fsdp2", router=LOSS_FREE, precision="bf16"), 2),
    ("ddp on one", tiny("ddp", router=LOSS_FREE), 1),
    ("fsdp2 on one", tiny("fsdp2", router=LOSS_FREE), 1),
]


def copy(config: Config, source: Path, target: Path, aside: bool) -> None:
    """Load and save again, from the backend's own tensors or from a snapshot written after they have changed."""
    backend = start(config)
    backend.load(source)
    if not aside:
        save(backend, target)
        return
    state = backend.copy_state()
    for parameter in backend.module.parameters():
        parameter.detach().zero_()
    target.mkdir(exist_ok=True)
    write_state(target, state)


@pytest.mark.promise("R7", backend=("single", "ddp", "fsdp2", "hsdp", "zero0", "zero1", "zero2", "zero3"))
@pytest.mark.parametrize("origin", ["fsdp2", pytest.param("zero 2", marks=pytest.mark.slow)])
def test_state_passes_through_every_backend_unchanged(
    origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero_config, "PERSIST_BELOW", 100)
    preload_deepspeed()
    configs = {name: config for name, config, _ in CHAIN}
    run_ranks(run_and_save, configs[origin], tmp_path / "first", tmp_path / "unused")
    written = stored_tensors(tmp_path / "first")
    assert written["optimizer.state.embed.weight.step"] == 3
    assert written["optimizer.state.embed.weight.exp_avg"].any()
    source = tmp_path / "first"
    for number, (name, config, world_size) in enumerate(CHAIN):
        run_ranks(copy, config, source, tmp_path / name, number % 2 == 0, world_size=world_size)
        assert digest(stored_tensors(tmp_path / name)) == digest(written), name
        source = tmp_path / name


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (1, 4), (3, 4, 2), (2, 1, 3)])
def test_ranges_of_a_flattened_tensor_are_boxes_of_it(shape: tuple[int, ...]) -> None:
    whole = torch.arange(float(torch.Size(shape).numel()))
    for first in range(len(whole)):
        for end in range(first + 1, len(whole) + 1):
            boxes = list(boxes_of_range(whole[first:end], first, shape))
            assert len(boxes) <= max(1, 2 * len(shape) - 1)
            covered = torch.full(shape, -1.0)
            for offsets, values in boxes:
                assert values.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
                box = tuple(slice(at, at + size) for at, size in zip(offsets, values.shape, strict=True))
                assert (covered[box] == -1).all()
                covered[box] = values
            expected = torch.full_like(whole, -1.0)
            expected[first:end] = whole[first:end]
            assert torch.equal(covered, expected.view(shape))


def test_a_copy_takes_each_replicated_tensor_once_and_keeps_its_values() -> None:
    tensors = {"a": torch.ones(8), "b": torch.ones(5), "c": torch.ones(4)}
    boxes = [((1, 0), torch.ones(2, 3))]
    tensors["d"] = Slices((4, 3), torch.float32, boxes)
    copies = [copy_to_host(tensors, rank, 2) for rank in range(2)]
    assert [sorted(copy) for copy in copies] == [["a", "d"], ["b", "c", "d"]]
    for tensor in (*list(tensors.values())[:3], boxes[0][1]):
        tensor.zero_()
    assert all(copy[name].all() for copy in copies for name in copy if name != "d")
    assert copies[0]["d"].boxes[0][1].all()
    with pytest.raises(TypeError, match="slices of a tensor"):
        copies[0]["d"].add(1)
