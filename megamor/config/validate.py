"""What must hold within and between fields. All violations are reported at once, each with the value and the fix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise

from megamor.config.batches import BatchSchedule
from megamor.config.derive import schedule_steps, total_steps
from megamor.config.schema import (
    Config,
    CustomRouterConfig,
    EmaThresholdConfig,
    ExpertChoiceConfig,
    FixedDepthConfig,
    RandomConfig,
    SkipForwardRecurseConfig,
    TokenChoiceConfig,
)
from megamor.errors import ConfigError

# A numeric field must be positive unless it is listed here; `router.` keys apply to the kinds that have them.
NON_NEGATIVE = frozenset(
    {
        "run.seed",
        "recursion.lora_rank",
        "parallel.zero_stage",
        "checkpoint.keep_best",
        "router.capacity_warmup_steps",
        "router.balance_warmup_steps",
        "router.aux_coeff",
        "router.balance_coeff",
        "router.bias_update_rate",
        "router.z_coeff",
        "router.depth_coeff",
        "router.ponder_coeff",
        "data.prefetch_steps",
        "diagnosis.plateau_after_step",
        "guard.max_rollbacks",
        "optim.weight_decay",
        "optim.warmup_steps",
    }
)
FRACTIONS = frozenset({"diagnosis.pinned_share", "optim.decay_fraction", "optim.min_lr_ratio"})
BELOW_ONE = frozenset(
    {"optim.beta1", "optim.beta2", "router.ema_decay", "router.epsilon", "router.inference_threshold"}
)


def validate(config: Config, world_size: int | None = None) -> None:
    """Check a configuration; with `world_size` (processes) also that the global batch can be divided among them.

    Raises `ConfigError` naming every rule that doesn't hold.
    """
    bounds = {**dict(_bounds(config)), **dict(_ramp(config))}
    problems = [*bounds.values(), *_names(config), *_sources(config)]
    rules: list[tuple[tuple[str, ...], Iterator[str]]] = [  # what a rule computes with, and the rule
        (("model", "data"), _model(config)),
        (("model", "recursion"), _sharing(config)),
        (("router", "recursion"), _router(config)),
        (("train",), _batch(config, world_size)),
        (("parallel",), _parallel(config, world_size)),
        (("train", "data", "router", "optim.warmup_steps", "optim.decay_fraction"), _length(config)),
    ]
    for inputs, violations in rules:
        if not any(key.startswith(inputs) for key in bounds):  # arithmetic with such values would mislead or fail
            problems += violations
    if problems:
        raise ConfigError("\n  ".join(["the configuration contradicts itself:", *problems]))


def _bounds(config: Config) -> Iterator[tuple[str, str]]:
    """(dotted key, what is wrong) of each number out of bounds."""
    for section in fields(config):
        settings = getattr(config, section.name)
        for setting in fields(settings):
            key, value = f"{section.name}.{setting.name}", getattr(settings, setting.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                holds, wanted = _bound(key, value)
                if not (holds and math.isfinite(value)):
                    yield key, f"{key} = {value}: give {wanted}"


def _bound(key: str, value: float) -> tuple[bool, str]:
    if key in NON_NEGATIVE:
        return value >= 0, "zero or a positive number"
    if key in FRACTIONS:
        return 0 <= value <= 1, "a number from 0 to 1"
    if key in BELOW_ONE:
        return 0 <= value < 1, "a number from 0 to just below 1"
    return value > 0, "a positive number"


def _sources(config: Config) -> Iterator[str]:
    budgets = [source.tokens is not None for source in config.data.train]
    for index, source in enumerate(config.data.train):
        name, share = ("weight", source.weight) if source.tokens is None else ("tokens", source.tokens)
        where = f"data.train[{index}].{name} = {share} ({source.prefix})"
        if not (math.isfinite(share) and share > 0):
            yield f"{where}: give a positive number, or drop the source"
        elif source.tokens is not None and source.weight != 1:
            yield f"{where} beside weight = {source.weight}: give one of them"
        elif source.tokens is None and any(budgets):
            yield f"data.train[{index}] ({source.prefix}) has no tokens and others have: give all of them, or weights"
    if any(budgets) and config.data.blend_temperature is not None:
        yield (
            f"data.blend_temperature = {config.data.blend_temperature} beside budgets of tokens in data.train: "
            "give one of them"
        )


def _names(config: Config) -> Iterator[str]:
    name = config.run.name
    if name in ("", ".", "..") or name != name.strip() or any(character in name for character in "/\\\0"):
        yield f"run.name = {name!r}: it becomes a directory under run.dir; give a name without slashes or outer spaces"
    for label in config.data.validation:
        if not label or "/" in label:
            yield f"data.validation has a set named {label!r}: it becomes part of a metric's name; drop the slash"


def _model(config: Config) -> Iterator[str]:
    model = config.model
    if model.dim % (2 * model.num_heads):
        yield (
            f"model.dim = {model.dim} can't be split into model.num_heads = {model.num_heads} heads of even width "
            f"(rotary embeddings need pairs): take dim {_multiples_around(model.dim, 2 * model.num_heads)}"
        )
    if model.num_heads % model.num_kv_heads:
        divisors = [n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0]
        yield (
            f"model.num_heads = {model.num_heads} isn't divisible by model.num_kv_heads = {model.num_kv_heads}: "
            f"take num_kv_heads {_either(divisors)}"
        )
    if config.data.seq_len > model.max_seq_len:
        yield (
            f"data.seq_len = {config.data.seq_len} is longer than model.max_seq_len = {model.max_seq_len}: "
            "shorten the samples or raise max_seq_len"
        )


def _sharing(config: Config) -> Iterator[str]:
    recursions, sharing = config.recursion.num_recursions, config.recursion.sharing
    if (recursions == 1) != (sharing == "none"):
        fix = "choose a sharing such as middle_cycle" if sharing == "none" else "set sharing: none for a vanilla model"
        pair = f"recursion.num_recursions = {recursions} with recursion.sharing = {sharing}"
        yield f"{pair}: {fix}, or change num_recursions"
        return
    outside = 2 if sharing.startswith("middle") else 0
    shared = config.model.num_layers - outside
    if shared < recursions or shared % recursions:
        what = "model.num_layers - 2 (the first and last layer are unique)" if outside else "model.num_layers"
        yield (
            f"model.num_layers = {config.model.num_layers} doesn't fit recursion.sharing = {sharing}: "
            f"{what} = {shared} isn't a multiple of recursion.num_recursions = {recursions}; "
            f"take num_layers {_multiples_around(shared, recursions, add=outside)}"
        )


def _router(config: Config) -> Iterator[str]:
    router, recursions = config.router, config.recursion.num_recursions
    if isinstance(router, FixedDepthConfig):
        if router.depth is not None and router.depth > recursions:
            yield (
                f"router.depth = {router.depth} is more than recursion.num_recursions = {recursions}: "
                f"give 1 to {recursions}, or null for all"
            )
        return
    if recursions == 1:
        yield (
            f"router.kind = {router.kind} with recursion.num_recursions = 1 has nothing to choose: "
            "use kind: fixed, or more recursions"
        )
    elif isinstance(router, ExpertChoiceConfig | EmaThresholdConfig | RandomConfig) and router.capacity is not None:
        yield from _capacity(router.capacity, recursions)
    elif isinstance(router, ExpertChoiceConfig) and router.inference_threshold == 0:
        yield "router.inference_threshold = 0.0 lets every token go on: give a number between 0 and 1"
    elif isinstance(router, SkipForwardRecurseConfig) and (router.target_depth or 0) > recursions:
        yield f"router.target_depth = {router.target_depth} is more than recursion.num_recursions = {recursions}"
    elif isinstance(router, CustomRouterConfig) and router.target.count(":") != 1:
        yield f"router.target = {router.target!r} doesn't name a class: write package.module:Class"


def _capacity(capacity: tuple[float, ...], recursions: int) -> Iterator[str]:
    shown, default = list(capacity), [round((recursions - r) / recursions, 4) for r in range(recursions)]
    if len(capacity) != recursions:
        yield (
            f"router.capacity = {shown} has {len(capacity)} entries for recursion.num_recursions = {recursions}: "
            f"give one for each recursion, or null for {default}"
        )
    if not all(0 < share <= 1 for share in capacity):
        yield f"router.capacity = {shown}: each entry is a share of the sequence, above 0 and at most 1"
    elif any(later > earlier for earlier, later in pairwise(capacity)):
        yield (
            f"router.capacity = {shown} rises, but a recursion picks among the tokens of the one before: "
            f"give shares that never rise, for example {default}"
        )


def _batch(config: Config, world_size: int | None) -> Iterator[str]:
    stages = [f"train.ramp[{index}]: " for index in range(len(config.train.ramp))]
    for stage, shape in zip((*stages, ""), BatchSchedule.of(config).shapes, strict=True):
        batch, micro = shape.global_batch_size, shape.micro_batch_size
        unit = micro * (world_size or 1)
        if batch % unit:
            divisor = f"train.micro_batch_size = {micro}" + (f" x {world_size} processes" if world_size else "")
            yield (
                f"{stage}train.global_batch_size = {batch} isn't divisible by {divisor}: "
                f"take global_batch_size {_multiples_around(batch, unit)}, or another micro_batch_size"
            )


def _parallel(config: Config, world_size: int | None) -> Iterator[str]:
    backend, degree = config.parallel.backend, config.parallel.shard_degree
    if backend == "single" and (world_size or 1) > 1:
        yield f"parallel.backend = single in a launch of {world_size} processes: use ddp, fsdp2, deepspeed or auto"
    if degree is None:
        return
    if backend not in ("auto", "fsdp2"):
        yield f"parallel.shard_degree = {degree} is for fsdp2, and parallel.backend is {backend}: drop one of them"
    elif world_size and world_size % degree and not (backend == "auto" and world_size == 1):
        yield (
            f"parallel.shard_degree = {degree} doesn't divide a launch of {world_size} processes into groups: "
            "give a divisor, or null for one group"
        )


def _ramp(config: Config) -> Iterator[tuple[str, str]]:
    """(dotted key, what is wrong) of the stages of `train.ramp`."""
    before = 0
    for index, stage in enumerate(config.train.ramp):
        key = f"train.ramp[{index}]"
        for name in ("global_batch_size", "micro_batch_size", "seq_len"):
            value = getattr(stage, name)
            if value is not None and value <= 0:
                yield f"{key}.{name}", f"{key}.{name} = {value}: give a positive number"
        if stage.seq_len is not None and stage.seq_len > config.data.seq_len:
            where = f"{key}.seq_len = {stage.seq_len}"
            yield (
                f"{key}.seq_len",
                f"{where} is more than data.seq_len = {config.data.seq_len}, that of the rest: shorten it",
            )
        if stage.until_step <= before:
            where = f"{key}.until_step = {stage.until_step}"
            yield key, f"{where} isn't after step {before}, at which the stage begins: give ascending steps from 1 on"
        before = stage.until_step


def _length(config: Config) -> Iterator[str]:
    train = config.train
    if (train.max_steps is None) == (train.max_tokens is None):
        found = "neither" if train.max_steps is None else f"both ({train.max_steps} and {train.max_tokens})"
        yield f"train.max_steps and train.max_tokens: found {found}; give exactly one"
        return
    steps = total_steps(config)
    warmup, decay = schedule_steps(config.optim, steps)
    if warmup > steps:
        yield f"optim.warmup_steps = {warmup} is more than the run's {steps} steps: shorten it or train longer"
    elif warmup + decay > steps:
        yield (
            f"optim.warmup_steps = {warmup} and a decay of {decay} steps "
            f"(optim.decay_fraction = {config.optim.decay_fraction}) don't fit into the run's {steps} steps: "
            "shorten one of them or train longer"
        )
    if train.fail_on_recompile_after is not None and not train.compile:
        yield (
            f"train.fail_on_recompile_after = {train.fail_on_recompile_after} with train.compile = false has nothing "
            "to watch: set train.compile: true, or drop it"
        )
    if train.ramp and train.ramp[-1].until_step >= steps:
        where = f"train.ramp ends at step {train.ramp[-1].until_step}"
        yield f"{where} and the run after {steps} steps: shorten the ramp or train longer"
    if train.stop_at_step is not None and train.stop_at_step > steps:
        where = f"train.stop_at_step = {train.stop_at_step} is after the run's last step {steps}"
        yield f"{where}: give 1 to {steps}, or null"
    if isinstance(config.router, ExpertChoiceConfig | TokenChoiceConfig):
        name = "capacity_warmup_steps" if isinstance(config.router, ExpertChoiceConfig) else "balance_warmup_steps"
        warmup = getattr(config.router, name)
        if warmup > steps:
            yield f"router.{name} = {warmup} is more than the run's {steps} steps: it would never end; shorten it"


def _multiples_around(value: int, unit: int, add: int = 0) -> str:
    """The nearest multiples of `unit` below and above `value`, each plus `add`, in words."""
    below = max(value, 0) // unit * unit
    return _either([multiple + add for multiple in (below, below + unit) if multiple > 0])


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
