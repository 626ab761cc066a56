"""Rules between settings. All violations are reported at once, each with the values and the fix.

Types and ranges of single settings are declared in the schema and checked when a configuration is read.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator
from itertools import pairwise

from megamor.config.batches import BatchSchedule
from megamor.config.changes import SETTINGS
from megamor.config.depth import most_recursions
from megamor.config.derive import decay_steps, is_estimate, total_steps
from megamor.config.routers import (
    CapacityConfig,
    CustomRouterConfig,
    FixedDepthConfig,
    HaltingConfig,
    MonotoneConfig,
    SkipForwardRecurseConfig,
    TargetConfig,
)
from megamor.config.schema import Config, DistillConfig, InitConfig, ModelConfig, OptimConfig
from megamor.config.segments import listed_stages, stage_config, stages
from megamor.errors import ConfigError


def validate(config: Config, world_size: int | None = None, *, run: bool = True) -> None:
    """Check the rules between settings; with `world_size` also those that depend on the number of processes.

    With `run` false, the length of the run may be left out.

    Raises:
        ConfigError: naming every rule that is broken.
    """
    problems = [
        *_names(config),
        *_init(config),
        *_distill(config),
        *_sources(config),
        *_model(config),
        *_sharing(config),
        *_router(config),
        *_depth(config),
        *_ramp(config),
        *_batch(config, world_size),
        *_parallel(config, world_size),
        *_length(config, run),
        *_allowed(config),
    ]
    if problems:
        raise ConfigError("\n  ".join(["the configuration contradicts itself:", *problems]))


def _names(config: Config) -> Iterator[str]:
    name = config.run.name
    if name in ("", ".", "..") or name != name.strip() or any(character in name for character in "/\\\0"):
        yield f"run.name = {name!r} is used as a directory below run.dir: give a name without slashes or outer spaces"
    for label in config.data.validation:
        if not label or "/" in label:
            yield f"data.validation has a set named {label!r}, which becomes part of metric names: drop the slash"
    if config.train.eval_tasks and config.data.tokenizer is None:
        yield f"train.eval_tasks = {', '.join(config.train.eval_tasks)} needs text: set data.tokenizer"
    for setting in ("eval_tasks_every", "eval_tasks_limit", "eval_tasks_fewshot"):
        if not config.train.eval_tasks and (value := getattr(config.train, setting)) is not None:
            yield f"train.{setting} = {value} without tasks: set train.eval_tasks, or leave it out"


def _init(config: Config) -> Iterator[str]:
    init = config.init
    if init.from_ is not None and init.branch_from is not None:
        given = f"init.from = {init.from_} and init.branch_from = {init.branch_from}"
        yield f"{given}: give the first to take weights alone, or the second to continue a run"
    for name in ("allow_missing", "router", "lora", "average", "convert"):
        if init.from_ is None and (value := getattr(init, name)) != getattr(InitConfig, name):
            yield f"init.{name} = {value} is about the weights of init.from, which is null: set it, or leave this out"
    if init.branch_from is not None and not re.fullmatch(r".+@(\d+|latest)", init.branch_from):
        yield f"init.branch_from = {init.branch_from} names no checkpoint of a run: write RUN@STEP, such as runs/x@1000"


def _distill(config: Config) -> Iterator[str]:
    distill = config.distill
    for name in ("weight", "temperature", "top_k"):
        if distill.from_ is None and (value := getattr(distill, name)) != getattr(DistillConfig, name):
            yield f"distill.{name} = {value} without a teacher: set distill.from, or leave it out"
    if distill.top_k is not None and distill.top_k >= config.model.vocab_size:
        tokens = f"distill.top_k = {distill.top_k} is all of model.vocab_size = {config.model.vocab_size}"
        yield f"{tokens}: leave it out to compare every token, or lower it"
    kernel = f"train.loss_kernel = {config.train.loss_kernel}"
    if distill.from_ is not None and config.train.loss_kernel in ("triton", "torch"):
        yield f"{kernel} computes no loss of distill.from = {distill.from_}: use auto or reference"
    if config.train.z_loss_coeff and config.train.loss_kernel == "torch":
        yield f"{kernel} has no z-loss, but train.z_loss_coeff = {config.train.z_loss_coeff}: use auto"


def _sources(config: Config) -> Iterator[str]:
    with_budget = [source.tokens is not None for source in config.data.train]
    for index, source in enumerate(config.data.train):
        if source.tokens is not None and source.weight != 1:
            where = f"data.train[{index}] ({source.prefix})"
            yield f"{where} has tokens = {source.tokens} and weight = {source.weight}: give one of them"
        elif source.tokens is None and any(with_budget):
            yield f"data.train[{index}] ({source.prefix}) has no tokens, but others do: give tokens to all, or weights"
    if any(with_budget) and config.data.blend_temperature is not None:
        given = f"data.blend_temperature = {config.data.blend_temperature}"
        yield f"{given} can't be combined with token budgets in data.train: give one of them"


def _model(config: Config) -> Iterator[str]:
    model = config.model
    if model.head_width is not None and model.head_width % 2:
        pairs = f"model.head_width = {model.head_width} is odd, and rotary embeddings need pairs"
        yield f"{pairs}: use head_width {_multiples_around(model.head_width, 2)}"
    elif model.head_width is None and model.dim % (2 * model.num_heads):
        widths = f"model.dim = {model.dim} can't be split into model.num_heads = {model.num_heads} heads of even width"
        fix = f"use dim {_multiples_around(model.dim, 2 * model.num_heads)}"
        yield f"{widths} (rotary embeddings need pairs): {fix}, or give head_width"
    if model.num_heads % model.num_kv_heads:
        divisors = _either([n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0])
        heads = f"model.num_heads = {model.num_heads} isn't divisible by model.num_kv_heads = {model.num_kv_heads}"
        yield f"{heads}: use num_kv_heads {divisors}"
    if (scaling := model.rope_scaling) is not None and scaling.low_freq_factor >= scaling.high_freq_factor:
        low = f"model.rope_scaling.low_freq_factor = {scaling.low_freq_factor}"
        yield f"{low} isn't below high_freq_factor = {scaling.high_freq_factor}: lower it"
    if config.data.seq_len > model.max_seq_len:
        lengths = f"data.seq_len = {config.data.seq_len} is longer than model.max_seq_len = {model.max_seq_len}"
        yield f"{lengths}: lower seq_len or raise max_seq_len"
    yield from _windows(model)
    if model.attention == "multi_scale":
        window, block = f"model.attention_window = {model.attention_window}", model.attention_block
        if model.attention_window % block:
            fix = f"use attention_window {_multiples_around(model.attention_window, block)}"
            yield f"{window} isn't a multiple of model.attention_block = {block}: {fix}"
        if model.attention_window >= model.max_seq_len:
            whole = f"covers all of model.max_seq_len = {model.max_seq_len}, so no block is ever averaged"
            yield f"{window} {whole}: use a shorter window, or model.attention: full"


def _windows(model: ModelConfig) -> Iterator[str]:
    window, layers = f"model.sliding_window = {model.sliding_window}", model.sliding_layers
    if bool(layers) != (model.sliding_window is not None):
        yield f"{window} with model.sliding_layers = {[*layers]}: give both, or neither"
    elif model.sliding_window is not None and model.attention == "multi_scale":
        yield f"{window} with model.attention = multi_scale, which has a window of its own: use attention: full"
    if model.sliding_rope_theta is not None and not layers:
        yield f"model.sliding_rope_theta = {model.sliding_rope_theta} without model.sliding_layers: leave it out"
    beyond = sorted(layer for layer in layers if layer >= model.num_layers)
    if beyond:
        last = f"model.num_layers = {model.num_layers}, whose last layer is {model.num_layers - 1}"
        yield f"model.sliding_layers has {beyond}, beyond {last}: leave them out, or add layers"


def _sharing(config: Config) -> Iterator[str]:
    recursions, sharing = config.recursion.num_recursions, config.recursion.sharing
    if config.recursion.router_layers or config.recursion.stages:
        yield from _stages(config)
        return
    if (recursions == 1) != (sharing == "none"):
        fix = "choose a sharing such as middle_cycle" if sharing == "none" else "set sharing: none for a vanilla model"
        pair = f"recursion.num_recursions = {recursions} with recursion.sharing = {sharing}"
        yield f"{pair}: {fix}, or change num_recursions"
        return
    unshared = 2 if sharing.startswith("middle") else 0
    shared = config.model.num_layers - unshared
    if shared < recursions or shared % recursions:
        what = "model.num_layers - 2 (the first and last layer are unique)" if unshared else "model.num_layers"
        yield (
            f"model.num_layers = {config.model.num_layers} doesn't fit recursion.sharing = {sharing}: "
            f"{what} = {shared} isn't a multiple of recursion.num_recursions = {recursions}; "
            f"use num_layers {_multiples_around(shared, recursions, add=unshared)}"
        )


def _stages(config: Config) -> Iterator[str]:
    recursion, end = config.recursion, 0
    named = {"stages": [stage.first_layer for stage in recursion.stages], "router_layers": recursion.router_layers}
    for name, layers in named.items():
        if len(layers) != len(set(layers)):
            yield f"recursion.{name} names a layer twice, among {[*layers]}: name it once"
    if recursion.sharing != "none":
        yield f"recursion.sharing = {recursion.sharing} with recursion.stages or router_layers: use none there"
    for stage in listed_stages(config):
        last = stage.first_layer + stage.num_layers - 1
        where = f"the recursion stage of layers {stage.first_layer} to {last}"
        if stage.first_layer < end:
            yield f"{where} overlaps the one before it, which ends with layer {end - 1}: give each layer to one stage"
        if last >= config.model.num_layers:
            yield f"{where}, counted from 0, exceeds model.num_layers = {config.model.num_layers}: change one of them"
        end = last + 1
        yield from (f"{where}: {problem}" for problem in _router(stage_config(config, stage)))


def _router(config: Config) -> Iterator[str]:
    router, recursions = config.router, config.recursion.num_recursions
    if config.recursion.router_layers or config.recursion.stages:
        return  # its stages are checked one by one
    # A token may skip a stage of one recursion, too; without a stage there is nothing to skip.
    skips = isinstance(router, SkipForwardRecurseConfig | MonotoneConfig) and config.recursion.sharing != "none"
    if recursions == 1 and not (skips or isinstance(router, FixedDepthConfig)):
        given = f"router.kind = {router.kind} with recursion.num_recursions = 1"
        yield f"{given} has nothing to choose: use kind: fixed, or more recursions"
        return
    if isinstance(router, TargetConfig):
        yield from _target(router, recursions)
    match router:
        case FixedDepthConfig(depth=int(depth)) if depth > recursions:
            given = f"router.depth = {depth} is more than recursion.num_recursions = {recursions}"
            yield f"{given}: give 1 to {recursions}, or null for all"
        case CapacityConfig(capacity=tuple(capacity)):
            yield from _capacity(capacity, recursions)
        case SkipForwardRecurseConfig():
            yield from _actions(router, recursions)
        case CustomRouterConfig(target=target) if target.count(":") != 1:
            yield f"router.target = {target!r} doesn't name a class: write package.module:Class"


def _target(router: TargetConfig, recursions: int) -> Iterator[str]:
    depth = router.depth(recursions)
    if depth is None:
        return
    name = "target_depth" if router.target_flops is None else "target_flops"
    given = f"router.{name} = {getattr(router, name)}"
    if None not in (router.target_depth, router.target_flops):
        yield f"router.target_depth = {router.target_depth} and {given} steer the same thing: give one of them"
    elif depth > recursions:
        yield f"{given} is more than recursion.num_recursions = {recursions}: lower it"
    elif depth < 1 and not isinstance(router, SkipForwardRecurseConfig | MonotoneConfig):
        least = 1 if name == "target_depth" else f"1 / {recursions}"
        yield f"{given} can't be reached, since every token takes the first recursion: give at least {least}"
    if isinstance(router, CapacityConfig) and router.capacity is not None:
        yield f"{given} decides the capacities, but router.capacity = {list(router.capacity)}: give one of them"
    if isinstance(router, HaltingConfig) and router.mode == "soft":
        yield f"{given} with router.mode = soft, which runs every token through all recursions: use mode: hard"


def _depth(config: Config) -> Iterator[str]:
    recursion, most = config.recursion, most_recursions(config)
    steps, given = recursion.schedule_steps, f"recursion.schedule = {recursion.schedule}"
    if most == 1 and recursion.schedule != "constant":
        yield f"{given} has nothing to change with recursion.num_recursions = 1: set constant, or more recursions"
    elif (recursion.schedule == "steps") != bool(steps):
        yield f"{given} with {len(steps)} recursion.schedule_steps: the schedule steps needs them, no other takes them"
    elif steps and (steps[0].at != 0 or any(later.at <= earlier.at for earlier, later in pairwise(steps))):
        starts = f"recursion.schedule_steps begin at {[item.at for item in steps]}"
        yield f"{starts}: begin at 0 and list them in ascending order"
    if (highest := max([recursion.schedule_start, *(item.recursions for item in steps)])) > most:
        yield f"{given} asks for {highest} recursions of {most}: lower it"
    for problem in dict.fromkeys(problem for stage in stages(config) for problem in _truncation(stage.config)):
        yield f"recursion.backprop_recursions = {recursion.backprop_recursions} {problem}, or set null"


def _truncation(config: Config) -> Iterator[str]:
    """What truncated backpropagation would leave without a gradient in the only stage of `config`."""
    recursion, router = config.recursion, config.router
    if (recursion.backprop_recursions or recursion.num_recursions) >= recursion.num_recursions:
        return
    if not isinstance(router, FixedDepthConfig) and getattr(router, "gates", "") != "open":
        fix = "use kind: fixed, or random with gates: open"
        yield f"leaves scores of router.kind = {router.kind} without a gradient: {fix}"
    if recursion.kv_policy == "share_first" or recursion.sharing.endswith("sequence"):
        used = f"kv_policy = {recursion.kv_policy} and sharing = {recursion.sharing} use in the first recursions only"
        yield f"never trains weights that {used}: use recursion_wise or hybrid, and cycle or middle_cycle"
    if recursion.schedule == "constant" and (recursion.separate_norms or recursion.lora_rank):
        own = "what separate_norms and lora_rank give the first recursions"
        yield f"never trains {own}: switch them off, or choose a schedule"


def _actions(router: SkipForwardRecurseConfig, recursions: int) -> Iterator[str]:
    if router.gate == "attention" and router.granularity == "sequence":
        given = "router.gate = attention with router.granularity = sequence"
        yield f"{given} would attend to the same mean at every recursion: use gate: mlp, or granularity: token"
    if router.granularity == "sequence" and router.depth(recursions) is not None:
        # Measured: up to 0.7 off. A document's tokens choose alike, so the depth jumps with the documents of a batch.
        yield "router.granularity = sequence can't hold a target depth: use granularity: token, or depth_coeff alone"
    given, most = f"router.recursion_rate = {router.recursion_rate}", (recursions - 1) / recursions
    if router.recursion_rate is not None and router.depth(recursions) is not None:
        yield f"{given} and a target depth are two targets of one loss: set one of them to null"
    elif router.recursion_rate is not None and router.recursion_rate >= most:
        yield f"{given} can't be reached, since no decision follows the last recursion: give less than {most:.4g}"


def _capacity(capacity: tuple[float, ...], recursions: int) -> Iterator[str]:
    given = f"router.capacity = {list(capacity)}"
    default = [round((recursions - r) / recursions, 4) for r in range(recursions)]
    if len(capacity) != recursions:
        wrong = f"has {len(capacity)} entries for recursion.num_recursions = {recursions}"
        yield f"{given} {wrong}: give one per recursion, or null for {default}"
    if any(later > earlier for earlier, later in pairwise(capacity)):
        wrong = "rises, but a recursion selects from the tokens of the one before"
        yield f"{given} {wrong}: give fractions that never rise, for example {default}"


def _ramp(config: Config) -> Iterator[str]:
    previous = 0
    for index, stage in enumerate(config.train.ramp):
        where = f"train.ramp[{index}]"
        if stage.seq_len is not None and stage.seq_len > config.data.seq_len:
            lengths = f"seq_len = {stage.seq_len} is more than data.seq_len = {config.data.seq_len}"
            yield f"{where}.{lengths}, the length after the ramp: lower it"
        if stage.until_step <= previous:
            steps = f"until_step = {stage.until_step} isn't after step {previous}, where the stage starts"
            yield f"{where}.{steps}: list the stages in ascending order"
        previous = stage.until_step


def _batch(config: Config, world_size: int | None) -> Iterator[str]:
    stages = [f"train.ramp[{index}]: " for index in range(len(config.train.ramp))]
    for stage, shape in zip((*stages, ""), BatchSchedule.of(config).shapes, strict=True):
        batch, micro = shape.global_batch_size, shape.micro_batch_size
        ranks = world_size or 1
        if batch % (micro * ranks):
            divisor = f"train.micro_batch_size = {micro}" + (f" x {world_size} processes" if world_size else "")
            smaller = next((size for size in range(micro, 0, -1) if batch % (size * ranks) == 0), None)
            fix = f"use global_batch_size {_multiples_around(batch, micro * ranks)}, or "
            fix += f"micro_batch_size {smaller}" if smaller else "another number of processes"
            yield f"{stage}train.global_batch_size = {batch} isn't divisible by {divisor}: {fix}"


def _parallel(config: Config, world_size: int | None) -> Iterator[str]:
    backend, degree = config.parallel.backend, config.parallel.shard_degree
    if backend == "single" and (world_size or 1) > 1:
        yield f"parallel.backend = single with {world_size} processes: use ddp, fsdp2, deepspeed or auto"
    if config.optim.kind == "muon" and backend == "deepspeed":
        given = "optim.kind = muon with parallel.backend = deepspeed"
        yield f"{given}: ZeRO's flat buffers hold no whole matrices; use ddp or fsdp2, or optim.kind: adamw"
    if config.parallel.deepspeed_config is not None and backend != "deepspeed":
        given = f"parallel.deepspeed_config = {config.parallel.deepspeed_config}"
        yield f"{given} needs parallel.backend = deepspeed, which is {backend}: change one of them"
    if degree is None:
        return
    if backend not in ("auto", "fsdp2"):
        yield f"parallel.shard_degree = {degree} needs fsdp2, but parallel.backend = {backend}: drop one of them"
    elif world_size and world_size % degree and not (backend == "auto" and world_size == 1):
        given = f"parallel.shard_degree = {degree} doesn't divide {world_size} processes into equal groups"
        yield f"{given}: give a divisor, or null for one group"


def _length(config: Config, run: bool) -> Iterator[str]:
    train = config.train
    if train.fail_on_recompile_after is not None and not train.compile:
        given = f"train.fail_on_recompile_after = {train.fail_on_recompile_after}"
        yield f"{given} has no effect with train.compile = false: set train.compile: true, or drop it"
    limits = {name: getattr(train, name) for name in ("max_steps", "max_tokens", "max_flops")}
    found = [f"train.{name} = {value}" for name, value in limits.items() if value is not None]
    if len(found) != 1:
        given = " and ".join(found) or "none"
        if found or run:
            yield f"train.max_steps, train.max_tokens, train.max_flops: found {given}; give exactly one"
        return
    if (decay := config.optim.decay_steps) is not None:
        if config.optim.decay_fraction != OptimConfig.decay_fraction:
            given = f"optim.decay_fraction = {config.optim.decay_fraction}"
            yield f"optim.decay_steps = {decay} and {given} say the same thing: give one of them"
        if config.optim.schedule != "wsd" or is_estimate(config):
            given = f"optim.schedule = {config.optim.schedule} and {found[0]}"
            yield f"optim.decay_steps = {decay} needs wsd and a known number of steps, but {given}: use decay_fraction"
    # How many steps max_flops allows is known where the model is known.
    if (steps := total_steps(config)) is not None:
        yield from _schedule(config, steps)
    if train.max_steps is not None and train.stop_at_step is not None and train.stop_at_step > train.max_steps:
        last = f"the run's last step {train.max_steps}"
        yield f"train.stop_at_step = {train.stop_at_step} is after {last}: lower it, or set null"


def validate_length(config: Config, steps: int) -> None:
    """Check that warm-ups, decay and ramp fit into a run of `steps` steps.

    Raises:
        ConfigError: naming every rule that is broken.
    """
    if problems := [*_schedule(config, steps)]:
        raise ConfigError("\n  ".join(["the configuration contradicts itself:", *problems]))


def _schedule(config: Config, steps: int) -> Iterator[str]:
    train, router = config.train, config.router
    if BatchSchedule.of(config).tokens(steps) > sys.maxsize:
        yield f"the run's {float(steps):.3g} steps have more tokens than can be counted: lower its limit"
        return
    warmup, decay = config.optim.warmup_steps, decay_steps(config.optim, steps)
    if warmup > steps:
        yield f"optim.warmup_steps = {warmup} is more than the run's {steps} steps: shorten it or train longer"
    elif warmup + decay > steps:
        name = "decay_fraction" if config.optim.decay_steps is None else "decay_steps"
        decaying = f"a decay of {decay} steps (optim.{name} = {getattr(config.optim, name)})"
        given = f"optim.warmup_steps = {warmup} and {decaying} don't fit into the run's {steps} steps"
        yield f"{given}: shorten one of them or train longer"
    if train.ramp and train.ramp[-1].until_step >= steps:
        where = f"train.ramp ends at step {train.ramp[-1].until_step}"
        yield f"{where}, but the run ends after {steps} steps: shorten the ramp or train longer"
    for name in ("capacity_warmup_steps", "balance_warmup_steps"):
        if (warmup := getattr(router, name, 0)) > steps:
            yield f"router.{name} = {warmup} is more than the run's {steps} steps: shorten it or train longer"


def _allowed(config: Config) -> Iterator[str]:
    for name in config.checkpoint.allow_changes:
        if name not in SETTINGS:
            close = difflib.get_close_matches(name, SETTINGS, n=1)
            fix = f"did you mean {close[0]}?" if close else "name single settings, such as router.alpha"
            yield f"checkpoint.allow_changes has {name!r}, which is no setting: {fix}"


def _multiples_around(value: int, unit: int, add: int = 0) -> str:
    """The nearest multiples of `unit` below and above `value`, each plus `add`, in words."""
    below = max(value, 0) // unit * unit
    return _either([multiple + add for multiple in (below, below + unit) if multiple > 0])


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
