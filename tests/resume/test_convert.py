"""megamor convert-checkpoint: one file with every weight once, and errors that leave no file behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from megamor.cli import convert_checkpoint
from megamor.config import Config, config_from_dict
from megamor.model import build_model
from tests.commands import refusal
from tests.distributed.runs import stored_tensors
from tests.resume.runs import LOSS_FREE, directory_of, fit, tiny_run, until


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with FSDP2 on two processes, after five of eight steps; its router has a buffer."""
    config = tiny_run(tmp_path_factory.mktemp("convert"), "fsdp2")
    config = replace(config, router=LOSS_FREE)
    assert all(fit(until(config, 5)))
    return config


def checkpoint_of(config: Config) -> Path:
    return directory_of(config) / "checkpoints" / "latest"


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
    # Tied weights are stored once: the file has exactly the parameters that the model counts.
    parameters = dict(model.named_parameters())
    assert sum(weights[name].numel() for name in parameters) == model.num_parameters()
    assert weights.keys() == model.state_dict().keys()

    half = tmp_path / "half.safetensors"
    convert_checkpoint.main([str(checkpoint_of(run)), "--dtype", "bfloat16", "--output", str(half)])
    assert {tensor.dtype for tensor in load_file(half).values()} == {torch.bfloat16}


@pytest.mark.promise("R16")
def test_errors_are_clear_and_leave_nothing(run: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(*arguments: str) -> str:
        message = refusal(capsys, convert_checkpoint.main, *arguments, "--output", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return message

    source = str(checkpoint_of(run))
    assert "there is no checkpoint at" in refused(str(tmp_path / "nowhere"), "--to", "safetensors")
    assert "ZeRO resumes from a checkpoint of any backend as it is" in refused(source, "--to", "deepspeed")
    (tmp_path / "out").mkdir()
    arguments = (source, "--to", "safetensors", "--output", tmp_path / "out")
    assert "exists: give another --output" in refusal(capsys, convert_checkpoint.main, *arguments)
