"""A made-up study of three arms with three seeds each: results, configs and logged lines as the real ones are."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megamor.config import Config, ExpertChoiceConfig, ModelConfig, RecursionConfig, config_to_yaml
from megamor.config.convert import config_to_dict
from megamor.study.statistics import paired_difference

SEEDS = (0, 1, 2)
STEPS, TOKENS_PER_STEP, FLOPS_PER_STEP = 120, 2048, 2.5e10
SEED_LOSS = {0: 0.0, 1: 0.11, 2: -0.08}
"""Seeds differ more than arms."""
ARM_LOSS = {
    "vanilla": (0.0, 0.0, 0.0),
    "mor": (-0.05, -0.06, -0.052),  # resolved against vanilla
    "random": (-0.045, -0.07, -0.03),  # not resolved against mor
}
"""What each seed of an arm adds."""
LABELS = {"vanilla": "vanilla", "mor": "expert-choice", "random": "random (open gates)"}
MODEL = ModelConfig(vocab_size=4096, dim=128, num_layers=8, num_heads=4, num_kv_heads=2, ffn_dim=352, max_seq_len=256)


def config_of(arm: str, seed: int) -> Config:
    """A config of the arm."""
    config = Config(model=MODEL)
    if arm != "vanilla":
        router = ExpertChoiceConfig(aux_coeff=0.01 if arm == "mor" else 0.02)
        recursion = RecursionConfig(num_recursions=3, sharing="middle_cycle")
        config = replace(config, recursion=recursion, router=router)
    return replace(config, run=replace(config.run, name=f"{arm}_seed{seed}", seed=seed))


def loss_at(step: int, arm: str, seed: int) -> float:
    """The validation loss, without noise."""
    return 3.0 + 5 * math.exp(-step / 40) + SEED_LOSS[seed] + ARM_LOSS[arm][seed]


def lines_of(arm: str, seed: int, steps: int = STEPS, tokens: int = TOKENS_PER_STEP) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl: each step, and a validation on two sets every 20 steps."""
    noise = np.random.default_rng(seed)
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        line: dict[str, Any] = {
            "step": step, "time": 1.7e9 + step, "train/loss": loss_at(step, arm, seed) + noise.normal(0, 0.1),
            "train/tokens_seen": step * tokens, "throughput/executed_flops": step * FLOPS_PER_STEP,
            "throughput/training_seconds": step * 0.4, "throughput/step_seconds": 0.4,
            "throughput/tokens_per_second_mean": 5000.0, "memory/peak_gib": 0.5, "memory/peak_reserved_gib": None,
        }  # fmt: skip
        if arm != "vanilla":
            deep = 0.2 + 0.4 * step / steps
            line |= {"depth/0": 0.0, "depth/1": 0.8 - deep, "depth/2": 0.2, "depth/3": deep}
            line |= {"routing/mean_depth": 1.2 + 2 * deep, "routing/entropy": 1.0, "routing/dead_depths": 0.0}
            line |= {"routing/topk_causal_agreement": 0.7 + 0.2 * step / steps, "routing/gate_1": 0.5}
        found.append(line)
        if step % 20 == 0:
            sets = {"a": loss_at(step, arm, seed) - 0.1, "b": loss_at(step, arm, seed) + 0.1}
            shown: dict[str, Any] = {"step": step, "time": 1.7e9 + step + 0.5}
            for name, loss in sets.items():
                modes = {"causal": loss} if arm == "vanilla" else {"causal": loss, "topk": loss - 0.01}
                for mode, value in modes.items():
                    shown[f"validation/{name}/loss_{mode}"] = value
                    shown[f"validation/{name}/flops_per_token_{mode}"] = 3.2e6 if arm == "vanilla" else 2.4e6
                    shown[f"validation/{name}/mean_depth_{mode}"] = 0.0 if arm == "vanilla" else 2.1
            found.append(shown)
    return found


def write_run(directory: Path, config: Config, lines: list[dict[str, Any]], *, checkpoint: bool = True) -> Path:
    """A run's directory; one that has just begun has no checkpoint."""
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if checkpoint:
        step = directory / "checkpoints" / f"step_{STEPS:08d}"
        step.mkdir(parents=True)
        (step / "config.yaml").write_text(config_to_yaml(config))
        (step.parent / "latest").symlink_to(step.name)
    return directory


def write_runs(root: Path) -> list[Path]:
    """All runs of the study."""
    return [write_run(root / f"{a}_seed{s}", config_of(a, s), lines_of(a, s)) for a in ARM_LOSS for s in SEEDS]


def write_study(root: Path, **changes: Any) -> Path:
    """The study's directory: results.json beside its runs, with a run that tried a learning rate."""
    directories = write_runs(root)
    write_run(root / "tune_mor_lr0.01", config_of("mor", 0), lines_of("mor", 0, 20))
    final = {arm: {seed: loss_at(STEPS, arm, seed) for seed in SEEDS} for arm in ARM_LOSS}
    rows = []
    for directory in directories:
        arm, _, seed = directory.name.partition("_seed")
        loss = final[arm][int(seed)]
        rows.append(
            {
                "arm": arm, "seed": int(seed), "budget": 3e12, "directory": str(directory), "lr": 2e-3, "loss": loss,
                "loss_topk": None if arm == "vanilla" else loss - 0.01, "mean_depth": 0.0 if arm == "vanilla" else 2.1,
                "mean_depth_topk": None, "flops_per_token": 3.2e6 if arm == "vanilla" else 2.4e6,
                "flops_per_token_topk": None, "accuracy": 0.3 - loss / 100, "bits_per_byte": loss / 3,
                "perplexity": math.exp(loss), "tokens": STEPS * TOKENS_PER_STEP,
                "executed_flops": STEPS * FLOPS_PER_STEP, "seconds": STEPS * 0.4, "tokens_per_second": 5000.0,
                "peak_memory_bytes": None, "kv_bytes_per_token": 2048 if arm == "vanilla" else 1024,
                "tasks": {"lambada": 0.2 - loss / 50},
            }
        )  # fmt: skip
    tuning = [{"lr": lr, "loss": 4 + math.log10(lr / 2e-3) ** 2} for lr in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)]
    arms = [
        {
            "name": arm, "label": LABELS[arm], "parameters": 2_000_000 if arm == "vanilla" else 1_200_000,
            "parameters_without_embedding": 1_500_000 if arm == "vanilla" else 700_000,
            "config": config_to_dict(config_of(arm, 0)), "lr": 2e-3, "tuning": tuning, "lr_at_edge": arm == "random",
            "of": None,
        }
        for arm in ARM_LOSS
    ]  # fmt: skip
    pairs = [("mor", "vanilla"), ("mor", "random"), ("random", "vanilla")]
    found = [(a, b, paired_difference(final[a], final[b])) for a, b in pairs]
    study = {
        "schema": "megamor-study/1", "name": "routing", "question": "Is learned routing better than random routing?",
        "match": "executed_flops", "budgets": [3e12], "command": "megamor study run studies/routing.yaml",
        "origin": {}, "seconds": 432.0, "arms": arms, "runs": rows,
        "floors": [{"name": "trigram", "loss": 3.2, "accuracy": None},
                   {"name": "bigram", "loss": 3.9, "accuracy": 0.2}],
        "expected": [{"what": "expert-choice against vanilla", "value": "-0.05", "source": "arXiv 2507.10524"}],
        "differences": [
            {"a": a, "b": b, "budget": 3e12, "metric": "loss", "mean": d.mean, "low": d.low, "high": d.high,
             "level": 0.95, "seeds": d.n, "verdict": d.verdict}
            for a, b, d in found
        ],
        "statements": ["expert-choice against random (open gates): not resolved."], "law": None, **changes,
    }  # fmt: skip
    (root / "results.json").write_text(json.dumps(study))
    return root
