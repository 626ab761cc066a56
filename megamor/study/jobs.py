"""The runs of a study. A job tries the learning rates of an arm, or trains and evaluates an arm with one seed.

What a job does depends on the study, the prepared data and, for the learning rate, on the result of the arm's tuning.
It writes `result.json` last, by which a later start recognises that it is finished; an interrupted run resumes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megamor.config import Config, SourceConfig, literal
from megamor.config.batches import BatchSchedule
from megamor.config.convert import config_to_dict
from megamor.config.validate import validate
from megamor.data.loader import open_validation_sets
from megamor.errors import ConfigError, MegamorError, TrainingError
from megamor.evaluate.kv_curve import bounded_loss
from megamor.evaluate.loss import dataset_losses
from megamor.evaluate.scoring import Scorer
from megamor.evaluate.tasks import load_tasks, plain_metrics, run_tasks
from megamor.files import parse_json, replace_file
from megamor.load import LoadedModel, load_model
from megamor.metrics import read_jsonl
from megamor.model.flops import expected_steps, nominal_flops
from megamor.parallel import World
from megamor.study.spec import Arm, Study
from megamor.train import build_trainer

RESULT_FILE, SETUP_FILE, METRICS_FILE = "result.json", "setup.json", "metrics.jsonl"
TUNING_SEED = 1000
"""Rates are tried with a seed of their own, so that none of the compared runs takes part in the choice."""
MAX_EXTENSIONS = 3
"""How often a grid is extended beyond its edge because the best rate lies there."""
_CACHE_SEQUENCES = 4


class Interrupted(Exception):
    """The job was asked to stop and has saved."""


@dataclass(frozen=True)
class Job:
    """The tuning of an arm (`seed` is None), or one of its runs."""

    arm: Arm
    budget: float
    seed: int | None
    name: str

    @property
    def is_tuning(self) -> bool:
        """Whether the job tries learning rates."""
        return self.seed is None


def jobs_of(study: Study) -> list[Job]:
    """All jobs in an order in which each comes after those that it needs."""
    tuned = [arm for arm in study.arms if arm.of is None and len(arm.rates) > 1]
    found = [Job(arm, study.pilot * study.budgets[0], None, f"tune_{arm.name}") for arm in tuned]
    # Seed by seed, so that a study that is cut short has whole pairs; arms that only evaluate others come last.
    for seed in range(study.seeds):
        for budget in study.budgets:
            part = f"_{budget:.2g}".replace("+", "") if len(study.budgets) > 1 else ""
            ordered = sorted(study.arms, key=lambda arm: arm.of is not None)
            found += [Job(arm, budget, seed, f"{arm.name}{part}_seed{seed}") for arm in ordered]
    return found


def needs(study: Study, job: Job) -> list[str]:
    """Names of the jobs whose results `job` reads."""
    if job.is_tuning:
        return []
    trained = study.trained(job.arm)
    tuning = [f"tune_{trained.name}"] if len(trained.rates) > 1 else []
    return tuning if job.arm.of is None else [*tuning, weights_job(study, job)]


def weights_job(study: Study, job: Job) -> str:
    """The job that trains the weights which `job` evaluates."""
    return study.trained(job.arm).name + job.name.removeprefix(job.arm.name)


def read_result(root: Path, name: str) -> dict[str, Any] | None:
    """The result of the job `name`; None if it isn't finished."""
    path = root / name / RESULT_FILE
    return parse_json(path.read_text(encoding="utf-8")) if path.exists() else None


def executed_so_far(root: Path, job: Job) -> float:
    """FLOPs that the unfinished runs of `job` have executed."""
    found = 0.0
    for metrics in root.glob(f"{job.name}{'_lr*' if job.is_tuning else ''}/{METRICS_FILE}"):
        with metrics.open("rb") as f:
            f.seek(max(0, f.seek(0, 2) - 2**17))
            for line in reversed(f.read().splitlines()):
                if line.startswith(b'{"step"') and b"executed_flops" in line and line.endswith(b"}"):
                    found += float(json.loads(line)["throughput/executed_flops"])
                    break
    return found


def expected_flops(study: Study, job: Job) -> float:
    """Training FLOPs of a job at nominal depth; 0 for one that only evaluates."""
    if job.arm.of is not None:
        return 0.0
    runs, config = len(job.arm.rates) if job.is_tuning else 1, job.arm.config
    if study.match == "executed_flops":
        return runs * job.budget
    tokens = job.budget
    if study.match == "none":
        start = (config.init.branch_from or "").rpartition("@")[2]
        batches = BatchSchedule.of(config)
        tokens = batches.tokens(expected_steps(config)) - batches.tokens(int(start) if start.isdigit() else 0)
    return runs * tokens / config.data.seq_len * nominal_flops(config).training


def fingerprint(study: Study) -> dict[str, Any]:
    """Whatever decides the result of a job; more seeds or another question don't."""
    shared = ("match", "budgets", "pilot", "warmup", "precision", "sequences", "data", "tasks")
    arms = {
        f"arms.{arm.name}": [config_to_dict(arm.config), arm.rates, arm.of, arm.exit and str(arm.exit)]
        for arm in study.arms
    }
    plain: dict[str, Any] = json.loads(json.dumps({**{name: getattr(study, name) for name in shared}, **arms}))
    return plain


def check_version(study: Study, root: Path) -> None:
    """Raises ConfigError if the study, or its base, isn't what `root` was set up for; an arm may be added."""
    wanted = fingerprint(study)
    for name, value in parse_json((root / SETUP_FILE).read_text(encoding="utf-8"))["study"].items():
        if wanted.get(name) != value:
            raise ConfigError(
                f"{root} holds results of another version of {study.file} ({name} differs): give another --out, or "
                "remove them"
            )


def run_config(study: Study, job: Job, rate: float, root: Path, name: str) -> Config:
    """The complete configuration of one training run of `job`."""
    setup = parse_json((root / SETUP_FILE).read_text(encoding="utf-8"))
    config, seed = job.arm.config, TUNING_SEED if job.seed is None else job.seed
    if config.init.branch_from is not None:
        seed = config.run.seed  # that of the run it continues
    if data := setup["data"]:
        sources = tuple(SourceConfig(**source) for source in data["train"])
        config = replace(config, data=replace(config.data, **{**data, "train": sources}))
    train = config.train
    if study.match == "executed_flops":
        train = replace(train, max_flops=job.budget)
    elif study.match != "none":
        train = replace(train, max_tokens=int(job.budget))
    precision = setup["precision"] or config.train.precision
    config = replace(
        config,
        run=replace(config.run, dir=literal(root.resolve()), name=name, seed=seed),
        train=replace(train, precision=precision),
    )
    steps = expected_steps(config)
    every = max(1, steps // 4)
    config = replace(
        config,
        optim=replace(config.optim, lr=rate, warmup_steps=min(max(1, round(study.warmup * steps)), max(steps - 1, 1))),
        train=replace(config.train, eval_every=every),
        checkpoint=replace(config.checkpoint, every_steps=every, keep_last=1),
        metrics=replace(config.metrics, progress=False),
    )
    validate(config)
    return config


def run_job(study: Study, job: Job, root: Path, world: World) -> dict[str, Any]:
    """Do a job, or what is left of it, and return its result. Collective.

    Raises:
        Interrupted: it was asked to stop; the next call resumes.
        MegamorError: it can't run, or the study has changed since it was set up.
    """
    check_version(study, root)
    if (found := read_result(root, job.name)) is not None:
        return found
    result = tune(study, job, root, world) if job.is_tuning else train(study, job, root, world)
    if world.is_main:
        (root / job.name).mkdir(parents=True, exist_ok=True)
        replace_file(root / job.name / RESULT_FILE, json.dumps(result, indent=1) + "\n")
    return result


def tune(study: Study, job: Job, root: Path, world: World) -> dict[str, Any]:
    """Train with each learning rate of the grid, and beyond its edge while the best one lies there."""
    losses: dict[float, float] = {}

    def best() -> float:
        return min(losses, key=lambda rate: losses[rate])

    for rate in grid(job.arm.rates, losses):
        name = f"{job.name}_lr{rate:.3g}"
        try:
            fit(run_config(study, job, rate, root, name), world)
            losses[rate] = final_loss(root / name)
        except TrainingError as error:  # a rate with which training diverges is a result
            print(f"{name}: {error}", flush=True)
            losses[rate] = math.inf
    if not math.isfinite(losses[best()]):
        raise TrainingError(f"{job.name}: training fails with every learning rate ({', '.join(map(str, losses))})")
    tried = [{"lr": rate, "loss": loss if math.isfinite(loss) else None} for rate, loss in sorted(losses.items())]
    return {"lr": best(), "lr_at_edge": best() in (min(losses), max(losses)), "tuning": tried}


def grid(rates: tuple[float, ...], losses: dict[float, float]) -> Iterator[float]:
    """The rates, then further ones beyond the edge at which the least of the `losses` lies."""
    yield from rates
    for _ in range(MAX_EXTENSIONS):
        ordered = sorted(losses)
        best = min(losses, key=lambda rate: losses[rate])
        if best == ordered[-1]:
            yield float(f"{best * ordered[-1] / ordered[-2]:.3g}")
        elif best == ordered[0]:
            yield float(f"{best * ordered[0] / ordered[1]:.3g}")
        else:
            return


def train(study: Study, job: Job, root: Path, world: World) -> dict[str, Any]:
    """Train an arm with one seed, unless it evaluates the weights of another one, and measure it."""
    trained = study.trained(job.arm)
    tuning = read_result(root, f"tune_{trained.name}") if len(trained.rates) > 1 else {"lr": trained.rates[0]}
    if tuning is None:
        raise MegamorError(
            f"{job.name} needs the learning rate of tune_{trained.name}, which isn't finished: run it first"
        )
    source = job.name if job.arm.of is None else weights_job(study, job)
    if job.arm.of is None:
        fit(run_config(study, job, tuning["lr"], root, source), world)
    loaded = load_model(root / source, str(world.device))
    if job.arm.exit is not None:
        loaded.model.set_exit(job.arm.exit)
    prefix = next(iter(loaded.config.data.validation.values()))
    figures = dataset_losses(loaded, prefix, sequences=study.sequences, batch_size=loaded.config.train.micro_batch_size)
    settings = replace(loaded.config.data, tokenizer=None)
    data = next(iter(open_validation_sets(settings, vocab_size=loaded.config.model.vocab_size).values()))
    cached = bounded_loss(loaded.model, data.batches(0, 1, _CACHE_SEQUENCES, _CACHE_SEQUENCES), None)
    metrics = [record for record in read_jsonl(root / source / METRICS_FILE) if "train/loss" in record]
    seconds = metrics[-1]["throughput/training_seconds"]
    tokens, peak = metrics[-1]["train/tokens_seen"], metrics[-1].get("memory/peak_gib")
    return {
        "arm": job.arm.name,
        "seed": job.seed,
        "budget": job.budget,
        "directory": source,
        "lr": tuning["lr"],
        "loss": figures["loss_causal"],
        "loss_topk": figures.get("loss_topk"),
        "perplexity": figures["perplexity_causal"],
        "accuracy": figures.get("accuracy_causal"),
        "bits_per_byte": figures.get("bits_per_byte_causal"),
        "mean_depth": figures["mean_depth_causal"],
        "mean_depth_topk": figures.get("mean_depth_topk"),
        "flops_per_token": figures["flops_per_token_causal"],
        "flops_per_token_topk": figures.get("flops_per_token_topk"),
        "tokens": tokens,
        "steps": metrics[-1]["step"],
        "executed_flops": metrics[-1]["throughput/executed_flops"],
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": None if peak is None or loaded.device.type == "cpu" else peak * 2**30,
        "kv_bytes_per_token": cached["kv_bytes"] / loaded.config.data.seq_len,
        "precision": loaded.config.train.precision,
        "tasks": task_scores(study, loaded) if study.tasks else {},
        "config": config_to_dict(loaded.config),
    }


def task_scores(study: Study, loaded: LoadedModel) -> dict[str, float]:
    """The scores of the study's downstream tasks, by task and metric."""
    wanted = study.tasks
    tasks = load_tasks(wanted["names"], num_fewshot=wanted.get("num_fewshot"), limit=wanted.get("limit"), quiet=True)
    scorer = Scorer.of(loaded, batch_size=loaded.config.train.micro_batch_size)
    found = run_tasks(scorer, loaded.codec(), tasks)["results"]
    return {f"{task}/{name}": value for task, own in found.items() for name, value in plain_metrics(own).items()}


def fit(config: Config, world: World) -> None:
    """Train to the end, or what is left. Raises Interrupted if it was asked to stop."""
    if not build_trainer(config, world).fit():
        raise Interrupted(config.run.name)


def final_loss(directory: Path) -> float:
    """The last loss of a run under the causal rule on its first validation set, by which arms are compared."""
    found: dict[str, float] = {}
    for record in read_jsonl(directory / METRICS_FILE):
        found |= {k: v for k, v in record.items() if k.startswith("validation/") and k.endswith("/loss_causal")}
    loss = next(iter(found.values()), math.inf)
    return float(loss) if math.isfinite(loss) else math.inf
