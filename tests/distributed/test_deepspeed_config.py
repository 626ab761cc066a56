"""`parallel.deepspeed_config`: a user's DeepSpeed file is merged, contradictions are named, and CPU offload trains."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megamor.cli import pretrain
from megamor.config import Config, OptimConfig, ParallelConfig, TrainConfig, config_to_yaml
from megamor.errors import ConfigError
from megamor.parallel.zero_config import PERSIST_BELOW, engine_config
from tests.commands import refusal
from tests.distributed.harness import run_ranks
from tests.distributed.runs import (
    EXPERT_CHOICE,
    assert_resumes_bitwise,
    digest,
    fresh_run,
    preload_deepspeed,
    stored_tensors,
    tiny,
)
from tests.distributed.test_zero import spoiled_step
from tests.resume.runs import directory_of, tiny_run

# What the documentation of Hugging Face's Trainer gives for ZeRO-3, word for word.
STOCK = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
RUN = Config(
    parallel=ParallelConfig(backend="deepspeed", zero_stage=3),
    train=TrainConfig(global_batch_size=64, micro_batch_size=4, max_steps=100),
    optim=OptimConfig(lr=1e-3),
)


@pytest.fixture(scope="module", autouse=True)
def deepspeed_before_forking() -> None:
    preload_deepspeed()


def merged(directory: Path, values: Any, config: Config = RUN, world_size: int = 2) -> dict[str, Any]:
    """The engine's settings with this file."""
    file = directory / "ds.json"
    file.write_text(values if isinstance(values, str) else json.dumps(values, indent="\t"))
    own = replace(config, parallel=replace(config.parallel, deepspeed_config=str(file)))
    return engine_config(own, world_size)


def test_the_stock_file_of_hugging_face(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = merged(tmp_path, STOCK)
    assert "the scheduler WarmupLR isn't used, but optim.schedule" in caplog.text
    own = engine_config(RUN, 2)
    zero = {key: value for key, value in STOCK["zero_optimization"].items() if value != "auto"}  # type: ignore[attr-defined]
    assert found["zero_optimization"] == {**zero, "stage3_param_persistence_threshold": PERSIST_BELOW}
    assert found["steps_per_print"] == 2000
    assert found["zero_force_ds_cpu_optimizer"] is False
    assert found["wall_clock_breakdown"] is False
    assert found["bf16"] == own["bf16"]
    assert not {"fp16", "optimizer", "scheduler", "train_batch_size"} & found.keys()
    assert found["gradient_accumulation_steps"] == 1


def test_values_that_repeat_the_runs_own(tmp_path: Path) -> None:
    repeated = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 7},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
    }
    expected = engine_config(RUN, 2)
    expected["zero_optimization"]["stage3_param_persistence_threshold"] = 7
    assert merged(tmp_path, repeated) == expected


def test_reduction_overlaps_with_the_backward_pass_unless_a_file_says_otherwise(tmp_path: Path) -> None:
    for stage in (1, 2):
        config = replace(RUN, parallel=ParallelConfig(backend="deepspeed", zero_stage=stage))  # type: ignore[arg-type]
        zero = engine_config(config, 2)["zero_optimization"]
        assert (zero["overlap_comm"], zero["reduce_bucket_size"]) == (True, 50_000_000)
        own = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 7}
        assert merged(tmp_path, {"zero_optimization": own}, config)["zero_optimization"].items() >= own.items()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"zero_optimization": {"stage": 2}}, "stage: the file has 2, the run 3; change it, or parallel.zero_stage"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu: the file has 8, the run 4"),
        ({"train_batch_size": 8}, "the file has 8, the run 64; change it, or train.global_batch_size"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: the file has 1, the run 8"),
        ({"gradient_clipping": 0.5}, "the file has 0.5, the run 1.0; change it, or optim.grad_clip"),
        ({"bf16": {"enabled": False}}, "the file has False, the run True; change it, or train.precision"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: the file has True, the run False"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type: the file has 'Lamb', the run 'AdamW' or 'Adam'"),
        ({"optimizer": {"params": {"lr": 1}}}, "lr: the file has 1, the run 0.001; change it, or optim.lr"),
        ({"optimizer": {"params": {"amsgrad": True}}}, "amsgrad = True: the optimizer is set in optim"),
        ({"scheduler": {"params": {"warmup_num_steps": 5}}}, "scheduler.params.warmup_num_steps = 5"),
        ({"communication_data_type": "bf16"}, "communication_data_type: the file has 'bf16', the run 'fp32'"),
        ({"amp": {"opt_level": "O1"}}, "amp: use train.precision; remove it from the file"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "use train.activation_checkpointing"),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation: unknown key; did you mean zero_optimization?"),
        ({"gradient_clipping": {"x": 1}}, "gradient_clipping.x = 1: gradient_clipping is a value, not an object"),
        ({"scheduler": "WarmupLR"}, "the schedule is optim.schedule; remove the scheduler"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "give 'cpu'"),
        ("{", "not valid"),
        ("[]", "found list, expected a mapping"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, values: Any, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        merged(tmp_path, values)
    assert said in str(refused.value)
    assert str(tmp_path / "ds.json") in str(refused.value)


def test_all_contradictions_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        merged(tmp_path, {"gradient_clipping": 9, "train_batch_size": 9, "fp16": {"enabled": True}})
    assert len(str(refused.value).splitlines()) == 4


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
def test_a_run_refuses_before_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str]) -> None:
    config = tiny_run(tmp_path, "deepspeed")
    (tmp_path / "run.yaml").write_text(config_to_yaml(config))
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 9}')
    chosen = f"parallel.deepspeed_config={tmp_path}/ds.json"
    said = refusal(capsys, pretrain.main, "--config", tmp_path / "run.yaml", *arguments, chosen)
    assert "gradient_clipping: the file has 9" in said
    missing = f"parallel.deepspeed_config={tmp_path}/no.json"
    said = refusal(capsys, pretrain.main, "--config", tmp_path / "run.yaml", *arguments, missing)
    assert f"{tmp_path}/no.json: no such" in said
    other = refusal(capsys, pretrain.main, "--config", tmp_path / "run.yaml", chosen, "parallel.backend=fsdp2")
    assert "needs parallel.backend = deepspeed" in other
    assert not directory_of(config).exists()


# --- CPU offload ------------------------------------------------------------------------------------------------------

OFFLOADED = [(1, "bf16", 1), (2, "fp32", 1), (3, "fp32", 2)]
SLOW = [(1, "fp32", 1), (2, "bf16", 1), (3, "bf16", 1), (3, "fp32", 1), (3, "bf16", 2)]
KINDS = [*OFFLOADED, *(pytest.param(*kind, marks=pytest.mark.slow) for kind in SLOW)]


def offloading(directory: Path, stage: int, precision: str, what: int) -> tuple[Config, Config]:
    """A run without a file, and one whose file moves the optimizer (and with 2 the weights) to the CPU's memory."""
    sections = ("offload_optimizer", "offload_param")[:what]
    zero = {section: {"device": "cpu", "pin_memory": False} for section in sections}
    (directory / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage, **zero}}))
    plain = tiny("deepspeed", zero_stage=stage, precision=precision, router=EXPERT_CHOICE)
    return plain, replace(plain, parallel=replace(plain.parallel, deepspeed_config=str(directory / "ds.json")))


@pytest.mark.parametrize(("stage", "precision", "what"), KINDS)
def test_offloading_trains_the_same(tmp_path: Path, stage: int, precision: str, what: int) -> None:
    plain, offloaded = offloading(tmp_path, stage, precision, what)
    expected, found = (run_ranks(fresh_run, config, 6)[0] for config in (plain, offloaded))
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-6)
    assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], rel=1e-6)


@pytest.mark.parametrize(("stage", "precision", "what"), KINDS)
def test_offloading_resumes_bitwise(tmp_path: Path, stage: int, precision: str, what: int) -> None:
    assert_resumes_bitwise(offloading(tmp_path, stage, precision, what)[1], tmp_path)


@pytest.mark.parametrize(("stage", "precision", "what"), KINDS)
def test_an_offloaded_step_that_is_not_finite_changes_nothing(
    tmp_path: Path, stage: int, precision: str, what: int
) -> None:
    config = offloading(tmp_path, stage, precision, what)[1]
    run_ranks(spoiled_step, config, tmp_path)
    assert digest(stored_tensors(tmp_path / "before")) == digest(stored_tensors(tmp_path / "after"))
    assert digest(stored_tensors(tmp_path / "next")) == digest(stored_tensors(tmp_path / "unspoiled"))
