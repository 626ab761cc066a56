"""`megamor convert-depth`: what it writes, what it says, and what it refuses without writing anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megamor.checkpoint import TrainerState, open_checkpoint
from megamor.checkpoint.layout import MANIFEST_FILE
from megamor.checkpoint.state import MODEL_PREFIX
from megamor.cli import convert_depth as command
from megamor.cli import pretrain
from megamor.config import config_to_yaml
from megamor.files import sha256_of_file
from megamor.interop.depth import convert_depth
from megamor.interop.weights import save_weights
from megamor.load import load_model
from megamor.model import build_model
from tests.combinations import SEQ_LEN, VOCAB, lively_model, vanilla_config
from tests.commands import refusal
from tests.resume.runs import write_shard


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a vanilla model of 8 layers."""
    config = vanilla_config()
    weights = lively_model(config, dtype=torch.float32).state_dict()
    stored = {MODEL_PREFIX + name: weight for name, weight in weights.items()}
    return save_weights(tmp_path_factory.mktemp("dense") / "model", stored, {"config.yaml": config_to_yaml(config)})


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A configuration that leaves the backbone to the dense model."""
    path = tmp_path / "mor.yaml"
    path.write_text(
        "recursion: {num_recursions: 3, sharing: middle_cycle}\nrouter: {kind: token_choice}\n"
        f"data: {{seq_len: {SEQ_LEN}}}\ntrain: {{max_steps: 100}}\nrun: {{seed: 3}}\n"
    )
    return path


def test_writes_a_checkpoint(dense: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = write_shard(tmp_path / "val", tokens=2_000, vocabulary=VOCAB)
    options = ["--init", "stepwise", "--output", str(tmp_path / "mor"), "--data", data, "recursion.separate_norms=true"]
    command.main(["--from", str(dense), "--to", str(target), *options])
    said = capsys.readouterr().out
    assert "checked: before sharing, the hidden states of every layer equal the original's" in said
    assert "routers of stage: drawn from run.seed = 3" in said
    assert "uniform guess 4.575" in said  # ln 97
    loaded, original = load_model(tmp_path / "mor", "cpu"), load_model(dense, "cpu")
    assert loaded.config.model == original.config.model
    expected = convert_depth(original.config, original.model.state_dict(), loaded.config, "stepwise")
    drawn = build_model(loaded.config, seed=3).state_dict()
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(weight, expected.get(name, drawn[name])), name
    started = TrainerState.read(open_checkpoint(tmp_path / "mor").directory).started_from
    assert started["kind"] == "convert-depth"
    assert started["source"] == str(dense)
    assert started["sha256"] == sha256_of_file(dense / MANIFEST_FILE)


def test_says_where_nothing_was_checked(
    dense: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--init", "lower", "--output", str(tmp_path / "mor"), "model.num_layers=14"]
    command.main(["--from", str(dense), "--to", str(target), *options])
    assert "not checked: with another number of applications" in capsys.readouterr().out
    assert load_model(tmp_path / "mor", "cpu").config.model.num_layers == 14


def test_a_configuration_of_the_model_alone_is_enough(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "overlay.yaml").write_text("recursion: {num_recursions: 3, sharing: middle_cycle}\n")
    options = ["--from", str(dense), "--to", str(tmp_path / "overlay.yaml"), "--init", "lower"]
    command.main([*options, "--output", str(tmp_path / "mor")])
    config = load_model(tmp_path / "mor", "cpu").config
    assert (config.data.seq_len, config.train.max_steps) == (SEQ_LEN, None)  # the dense model's context, and no length
    start = ["--config", tmp_path / "mor" / "step_00000000" / "config.yaml", "--dry-run"]
    assert "train.max_steps, train.max_tokens, train.max_flops: found none" in refusal(capsys, pretrain.main, *start)
    both = ["train.max_steps=1", "train.max_tokens=9"]
    assert "give exactly one" in refusal(capsys, command.main, *options, "--output", tmp_path / "b", *both)
    name = refusal(capsys, command.main, "--from", "owner/name", *options[2:], "--output", tmp_path / "b")
    assert "there is no checkpoint at owner/name" in name
    assert "hf:OWNER/NAME" in name


def test_refusals(dense: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--from", dense, "--to", target, "--output", tmp_path / "mor"]
    assert "model.dim is 32 and in the target 64" in refusal(
        capsys, command.main, *options, "--init", "lower", "model.dim=64"
    )
    assert "method 'mean' is unknown" in refusal(capsys, command.main, *options, "--init", "mean")
    assert "recursion.lora_rank = 0" in refusal(capsys, command.main, *options, "--init", "svd_lora:8")
    assert not (tmp_path / "mor").exists()
    (tmp_path / "mor").mkdir()
    (tmp_path / "mor" / "kept").touch()
    assert "is not an empty directory" in refusal(capsys, command.main, *options, "--init", "lower")
