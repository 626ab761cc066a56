"""The settings of a DeepSpeed engine: those that follow from a run's, and a user's own DeepSpeed file merged into them.

Nothing of a user's file is dropped silently. A key that megamor sets too must agree with it or be "auto", as in Hugging
Face's files; a key for which megamor has a mechanism of its own is refused; all others are passed on.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from megamor.config import Config, read_mapping
from megamor.errors import ConfigError

log = logging.getLogger("megamor.parallel")

# Stage 3 keeps parameters with fewer elements than this whole on every rank: gathering a norm costs more than the
# memory it saves.
PERSIST_BELOW = 10_000

BUCKET_ELEMENTS = 50_000_000
"""Gradients that stages 1 and 2 reduce at once, while the backward pass computes the next. DeepSpeed's 5e8 are more
than these models have, so that nothing would overlap, and it allocates two buckets of that size."""

_FREE = (
    *("zero_optimization.stage3_param_persistence_threshold", "zero_optimization.reduce_bucket_size"),
    *("zero_optimization.overlap_comm", "steps_per_print"),
)
"""Ours, but a user's value wins."""
_REFUSED = {
    "amp": "use train.precision",
    "activation_checkpointing": "use train.activation_checkpointing",
    "pipeline": "megamor has no pipeline parallelism",
    "elasticity": "a run may be resumed with any number of processes",
    "data_efficiency": "use train.ramp",
    "curriculum_learning": "use train.ramp",
    "progressive_layer_drop": "the router decides about depth",
    "compression_training": "megamor has no compression",
}
_SETTING = {
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_clipping": "optim.grad_clip",
    "zero_optimization.stage": "parallel.zero_stage",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision, which is bf16 or fp32",
    "train_batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size, over micro-batches and processes",
    "optimizer.type": "none: megamor trains with AdamW",
    "optimizer.params.lr": "optim.lr",
    "optimizer.params.betas": "optim.beta1 and optim.beta2",
    "optimizer.params.eps": "optim.eps",
    "optimizer.params.weight_decay": "optim.weight_decay",
}


def engine_config(config: Config, world_size: int) -> dict[str, Any]:
    """DeepSpeed's settings for a run on `world_size` processes.

    The training loop accumulates gradients and scales losses, so to the engine every step has one micro-batch.

    Raises:
        ConfigError: `parallel.deepspeed_config` can't be read, or contradicts the run's settings.
    """
    stage, bf16 = config.parallel.zero_stage, config.train.precision == "bf16"
    # A sum of bf16 gradients over many ranks or micro-batches loses the small ones, so both kinds of sums are in fp32.
    fp32_sums = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    zero = {"stage": stage, "stage3_param_persistence_threshold": PERSIST_BELOW}
    if stage in (1, 2):
        zero |= {"overlap_comm": True, "reduce_bucket_size": BUCKET_ELEMENTS}
    own = {
        **fp32_sums,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.grad_clip if stage > 0 else 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16 and stage > 0, "check_grad_overflow": True},  # leave out steps that aren't finite
        "torch_autocast": {"enabled": bf16 and stage == 0, "dtype": "bfloat16"},
        "steps_per_print": None,
    }
    if config.parallel.deepspeed_config is None:
        return own
    file = config.parallel.deepspeed_config
    return _merged(own, _without_auto(read_mapping(Path(file))), _of_the_run(config, world_size), file)


def _without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without what is "auto", which means megamor's own value or DeepSpeed's default."""
    kept = {name: value for name, value in values.items() if value != "auto"}
    kept = {name: _without_auto(value) if isinstance(value, dict) else value for name, value in kept.items()}
    return {name: value for name, value in kept.items() if value != {}}


def _of_the_run(config: Config, world_size: int) -> dict[str, Any]:
    """What a user's file may repeat of the run's settings, by dotted key; the engine gets it in another way."""
    train, optim = config.train, config.optim
    return {
        "gradient_clipping": optim.grad_clip,
        "bf16.enabled": train.precision == "bf16",
        "fp16.enabled": False,
        "train_batch_size": train.global_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (train.micro_batch_size * world_size),
        "optimizer.type": ("AdamW", "Adam"),  # DeepSpeed's Adam is AdamW by default
        "optimizer.params.lr": optim.lr,
        "optimizer.params.betas": [optim.beta1, optim.beta2],
        "optimizer.params.eps": optim.eps,
        "optimizer.params.weight_decay": optim.weight_decay,
        "optimizer.params.torch_adam": (True, False),
        "optimizer.params.adam_w_mode": True,
    }


def _merged(own: dict[str, Any], theirs: dict[str, Any], run: Mapping[str, Any], file: str) -> dict[str, Any]:
    """`own` with what `theirs` adds to it. Raises ConfigError with a line for each contradiction."""
    scheduler = theirs.get("scheduler")
    if isinstance(scheduler, dict) and not scheduler.get("params"):
        log.warning("%s: the scheduler %s isn't used, but optim.schedule", file, scheduler.get("type", ""))
        del theirs["scheduler"]
    problems = []
    known = {*own, *_REFUSED, *(key.partition(".")[0] for key in run), "scheduler"}
    merged = deepcopy(own)
    for key, value in _leaves(theirs):
        section, _, _ = key.partition(".")
        ours = run[key] if key in run else _look_up(own, key)
        if section in _REFUSED and value not in (False, None) and not key.endswith(".enabled"):
            problems.append(f"{section}: {_REFUSED[section]}; remove it from the file")
        elif section == "scheduler":
            problems.append(f"{key} = {value!r}: the schedule is optim.schedule; remove the scheduler from the file")
        elif section == "optimizer" and key not in run:
            problems.append(f"{key} = {value!r}: the optimizer is set in optim; remove it from the file")
        elif ours is not _ABSENT and key not in _FREE:
            allowed = ours if isinstance(ours, tuple) else (ours,)
            if value not in allowed:
                change = f"; change it, or {_SETTING[key]}" if key in _SETTING else ""
                problems.append(f"{key}: the file has {value!r}, the run {' or '.join(map(repr, allowed))}{change}")
        elif section not in known and (close := difflib.get_close_matches(section, known, n=1, cutoff=0.8)):
            problems.append(f"{section}: unknown key; did you mean {close[0]}?")
        elif key.endswith(("offload_optimizer.device", "offload_param.device")) and value not in ("cpu", "none"):
            problems.append(f"{key} = {value!r}: megamor's checkpoints read the state in memory; give 'cpu'")
        elif section not in ("fp16", "optimizer") and not _put(merged, key, value):
            problems.append(f"{key} = {value!r}: {section} is a value, not an object")
    if problems:
        heading = f"parallel.deepspeed_config {file} contradicts the run:"
        raise ConfigError("\n  ".join([heading, *dict.fromkeys(problems)]))
    if _look_up(merged, "zero_optimization.offload_optimizer") is not _ABSENT:
        # The engine would insist on an Adam of its own, which is compiled at its first use.
        merged.setdefault("zero_force_ds_cpu_optimizer", False)
    return merged


_ABSENT = object()


def _leaves(values: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    """(Dotted key, value) of everything that isn't an object with contents."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{key}{name}.")
        else:
            yield f"{key}{name}", value


def _look_up(values: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return _ABSENT
        values = values[name]
    return values


def _put(values: dict[str, Any], key: str, value: Any) -> bool:
    """Set the value at dotted `key`. False, and nothing is set, if a section on the way is a value."""
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(values := values.setdefault(section, {}), dict):
            return False
    values[name] = value
    return True
