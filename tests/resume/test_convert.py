"""megamor convert-checkpoint: element-wise equality with the optimizer's moments, one file of weights, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from megamor.cli import convert_checkpoint
from megamor.config import Config, ParallelConfig, config_from_dict
from megamor.model import build_model
from tests.distributed.harness import run_ranks
from tests.distributed.runs import digest, preload_deepspeed, stored_tensors
from tests.resume.runs import LOSS_FREE, assert_same_run, directory_of, fit, named, tiny_run, trace, until


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with FSDP2 on two processes, after five of eight steps; its router has a buffer."""
    config = tiny_run(tmp_path_factory.mktemp("convert"), "fsdp2")
    config = replace(config, router=LOSS_FREE)
    assert all(fit(until(config, 5)))
    return config


@pytest.fixture(autouse=True)
def forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are forked, which takes seconds less than the tool's own way."""
    preload_deepspeed()

    def fork(count: int, action: Callable[[], Any]) -> None:
        run_ranks(action, world_size=count)

    monkeypatch.setattr(convert_checkpoint, "on_processes", fork)


def checkpoint_of(config: Config) -> Path:
    return directory_of(config) / "checkpoints" / "latest"


@pytest.mark.promise("R7")
@pytest.mark.parametrize(
    ("stage", "processes"), [(1, 3), (2, 2), pytest.param(3, 3), pytest.param(2, 1, marks=pytest.mark.slow)]
)
def test_to_deepspeed_and_back(run: Config, tmp_path: Path, stage: int, processes: int) -> None:
    native, back = tmp_path / "native", named(run, f"back_{stage}_{processes}")
    arguments = ["--to", "deepspeed", "--zero-stage", str(stage), "--processes", str(processes)]
    convert_checkpoint.main([str(checkpoint_of(run)), *arguments, "--output", str(native)])
    original = stored_tensors(checkpoint_of(run))
    # DeepSpeed's own reader finds the same weights in it.
    assert_deepspeed_reads(native, {name: tensor for name, tensor in original.items() if name.startswith("model.")})

    convert_checkpoint.main([str(native), "--to", "megamor", "--output", str(checkpoint_of(back).parent)])
    assert original["optimizer.state.embed.weight.exp_avg_sq"].any()
    assert digest(stored_tensors(checkpoint_of(back))) == digest(original)


def assert_deepspeed_reads(native: Path, expected: dict[str, torch.Tensor]) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found = get_fp32_state_dict_from_zero_checkpoint(str(native), tag="engine")
    assert {f"model.{name}" for name in found} == expected.keys()
    assert all(torch.equal(tensor, expected[f"model.{name}"]) for name, tensor in found.items())


def test_training_goes_on_from_what_came_back(run: Config, tmp_path: Path) -> None:
    native, back = tmp_path / "native", named(run, "goes_on")
    convert_checkpoint.main([str(checkpoint_of(run)), "--to", "deepspeed", "--processes", "2", "--output", str(native)])
    convert_checkpoint.main([str(native), "--to", "megamor", "--output", str(checkpoint_of(back).parent)])
    straight = named(run, "straight")
    assert all(fit(straight))
    assert all(fit(replace(back, parallel=ParallelConfig("fsdp2"))))
    expected, found = trace(straight), trace(back)
    assert_same_run(replace(expected, steps=[], validation=[]), replace(found, steps=[], validation=[]))
    assert [record["step"] for record in found.steps] == [6, 7, 8]


@pytest.mark.promise("R10")
def test_one_file_of_weights(run: Config, tmp_path: Path) -> None:
    file = tmp_path / "new" / "weights.safetensors"
    convert_checkpoint.main([str(checkpoint_of(run)), "--to", "safetensors", "--output", str(file)])
    weights = load_file(file)
    stored = stored_tensors(checkpoint_of(run))
    assert all(torch.equal(tensor, stored[f"model.{name}"]) for name, tensor in weights.items())
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    model = build_model(config_from_dict(yaml.safe_load(metadata["config"])))
    assert metadata["step"] == "5"
    model.load_state_dict(weights)
    # Tied weights once: what is in the file is what the model counts.
    parameters = dict(model.named_parameters())
    assert sum(weights[name].numel() for name in parameters) == model.num_parameters()
    assert weights.keys() == model.state_dict().keys()

    half = tmp_path / "half.safetensors"
    convert_checkpoint.main(
        [str(checkpoint_of(run)), "--to", "safetensors", "--dtype", "bfloat16", "--output", str(half)]
    )
    assert {tensor.dtype for tensor in load_file(half).values()} == {torch.bfloat16}


@pytest.mark.promise("R16")
def test_errors_are_clear_and_leave_nothing(run: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            convert_checkpoint.main([*arguments, "--output", str(tmp_path / "out")])
        assert exit_.value.code == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    source = str(checkpoint_of(run))
    assert "there is no checkpoint at" in refused(str(tmp_path / "nowhere"), "--to", "safetensors")
    assert "isn't what `--to deepspeed` writes" in refused(source, "--to", "megamor")
    assert "--processes 0: give at least 1" in refused(source, "--to", "deepspeed", "--processes", "0")
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        convert_checkpoint.main([source, "--to", "safetensors", "--output", str(tmp_path / "out")])
    assert "exists: give another --output" in capsys.readouterr().err


@pytest.mark.slow
def test_the_tools_own_processes(run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    native = tmp_path / "native"
    convert_checkpoint.main([str(checkpoint_of(run)), "--to", "deepspeed", "--processes", "2", "--output", str(native)])
    assert sorted(path.name for path in (native / "engine").glob("*optim_states.pt"))
