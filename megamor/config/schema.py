"""Every setting of a run, as frozen dataclasses. Defaults follow the recipe of arXiv 2507.10524 where it has one.

A section whose type is a union (`router`) is told apart by its `kind`. Loading and overlays are in `load.py`, what must
hold between fields in `validate.py`, what follows from them in `derive.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Sharing = Literal["none", "cycle", "sequence", "middle_cycle", "middle_sequence"]
RouterHead = Literal["linear", "mlp", "wide_mlp"]
Gating = Literal["weighted", "additive"]
SelectiveOp = Literal["sdpa", "mm", "silu"]
Alarm = Literal["off", "warn", "stop"]


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    name: str = "run"
    dir: str = "runs"
    seed: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """Llama backbone (paper section 3; no biases, no dropout, head tied to the embedding).

    `num_layers` is the effective depth: the number of blocks a token of full depth passes through. `document_positions`
    says whether positions start anew with each document where documents are kept apart.
    """

    vocab_size: int = 49152
    dim: int = 576
    num_layers: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3
    ffn_dim: int = 1536
    max_seq_len: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    document_positions: Literal["continue", "restart"] = "continue"

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads


@dataclass(frozen=True)
class RecursionConfig:
    """How layers are shared (paper section 2.2.1, table 1). `num_recursions: 1` with `sharing: none` is vanilla.

    Three options tell the recursions of a shared block apart: an embedding of the recursion added to the core's input,
    norms of their own, and low-rank updates of the shared matrices (relaxed recursive transformers, arXiv 2410.20672).
    """

    num_recursions: int = 1
    sharing: Sharing = "none"
    kv_policy: Literal["recursion_wise", "share_first", "hybrid"] = "recursion_wise"
    recursion_embedding: bool = False
    separate_norms: bool = False
    lora_rank: int = 0


@dataclass(frozen=True)
class FixedDepthConfig:
    """Every token takes the same number of recursions (all of them unless `depth` says fewer)."""

    kind: Literal["fixed"] = "fixed"
    depth: int | None = None


@dataclass(frozen=True)
class ExpertChoiceConfig:
    """Each recursion picks its top-k tokens among those of the recursion before (paper section 2.2.1).

    `capacity` is the share of the sequence at each recursion; unset means (Nr - r) / Nr. At inference a token goes on
    if the sigmoid of its score is at least `inference_threshold`.
    """

    kind: Literal["expert_choice"] = "expert_choice"
    head: RouterHead = "linear"
    activation: Literal["sigmoid", "tanh", "none"] = "sigmoid"
    alpha: float = 0.1
    temperature: float = 1.0
    gating: Gating = "weighted"
    capacity: tuple[float, ...] | None = None
    capacity_warmup_steps: int = 0
    sampling: Literal["aux_loss", "aux_router"] = "aux_loss"
    aux_coeff: float = 0.001
    inference_threshold: float = 0.5
    z_coeff: float = 0.0


@dataclass(frozen=True)
class TokenChoiceConfig:
    """Each token picks its depth once, before the first recursion (paper section 2.2.1)."""

    kind: Literal["token_choice"] = "token_choice"
    head: RouterHead = "linear"
    activation: Literal["softmax", "sigmoid"] = "softmax"
    alpha: float = 1.0
    temperature: float = 1.0
    gating: Gating = "weighted"
    balancing: Literal["loss", "loss_free", "none"] = "loss"
    balance_coeff: float = 0.1
    bias_update_rate: float = 0.001
    balance_warmup_steps: int = 0
    z_coeff: float = 0.0


@dataclass(frozen=True)
class EmaThresholdConfig:
    """Expert-choice with a threshold instead of a top-k, causal in training too (after arXiv 2603.11535, for experts).

    Each recursion follows, with an exponential moving average of decay `ema_decay`, the score above which its share of
    the tokens lies, and takes the tokens above it; `capacity` holds on average.
    """

    kind: Literal["ema_threshold"] = "ema_threshold"
    head: RouterHead = "linear"
    activation: Literal["sigmoid", "tanh", "none"] = "sigmoid"
    alpha: float = 0.1
    temperature: float = 1.0
    gating: Gating = "weighted"
    capacity: tuple[float, ...] | None = None
    ema_decay: float = 0.95
    z_coeff: float = 0.0


@dataclass(frozen=True)
class RandomConfig:
    """A control: expert-choice's gates, but tokens are selected at random, so that `capacity` holds on average."""

    kind: Literal["random"] = "random"
    head: RouterHead = "linear"
    activation: Literal["sigmoid", "tanh", "none"] = "sigmoid"
    alpha: float = 0.1
    temperature: float = 1.0
    gating: Gating = "weighted"
    capacity: tuple[float, ...] | None = None
    z_coeff: float = 0.0


@dataclass(frozen=True)
class SkipForwardRecurseConfig:
    """Before each application a token skips it (and leaves), takes it and leaves, or takes it and decides again.

    Decisions are straight-through Gumbel-softmax samples in training (arXiv 1611.01144), whose temperature falls
    linearly from `temperature_start` to `temperature_end` over `temperature_steps`, and the likeliest choice at
    inference.
    `depth_coeff` weighs the expected depth, or with `target_depth` its squared distance from that.
    """

    kind: Literal["skip_forward_recurse"] = "skip_forward_recurse"
    hidden: int = 128
    depth_coeff: float = 0.01
    target_depth: float | None = None
    temperature_start: float = 1.0
    temperature_end: float = 0.5
    temperature_steps: int = 1000


@dataclass(frozen=True)
class HaltingConfig:
    """Adaptive computation time (arXiv 1603.08983): halting probabilities add up, the output is their weighted mean.

    soft: every token runs all recursions; hard: a halted token leaves, which saves its compute. `ponder_coeff` weighs
    the ponder cost (updates + remainder).
    """

    kind: Literal["act"] = "act"
    mode: Literal["soft", "hard"] = "hard"
    epsilon: float = 0.01
    ponder_coeff: float = 0.001


@dataclass(frozen=True)
class CustomRouterConfig:
    """A router of your own: `target` is `package.module:Class`, called with (options, dim, num_recursions)."""

    target: str
    kind: Literal["custom"] = "custom"
    options: Mapping[str, float] = field(default_factory=dict)


RouterConfig = (
    FixedDepthConfig
    | ExpertChoiceConfig
    | TokenChoiceConfig
    | EmaThresholdConfig
    | RandomConfig
    | SkipForwardRecurseConfig
    | HaltingConfig
    | CustomRouterConfig
)


@dataclass(frozen=True)
class SourceConfig:
    """One training data set: the `<prefix>.bin`/`<prefix>.idx` pair and its share of the samples.

    The share is `weight` out of the sum of weights, or `tokens` out of the sum of all sources' budgets.
    """

    prefix: str
    weight: float = 1.0
    tokens: float | None = None


@dataclass(frozen=True)
class DataConfig:
    """Token shards. `tokenizer` is copied into every checkpoint and must be the one that wrote the shards.

    `packing` says what a window of training holds: a stretch of the documents one after the other (`stream`), whole
    documents and padding (`best_fit`), or one document and padding (`document`). With `document_mask` attention stays
    inside each document. With `blend_temperature` T, weights are multiplied by size^(1/T). Windows are shuffled in
    chunks of `chunk_len` tokens (default: `seq_len` at the start of the run), which are better not shorter than any
    `seq_len` that the run will have. A source that has been read is read again, or ends the run (`on_exhausted`).
    """

    train: tuple[SourceConfig, ...] = ()
    validation: Mapping[str, str] = field(default_factory=dict)
    tokenizer: str | None = None
    seq_len: int = 2048
    packing: Literal["stream", "best_fit", "document"] = "stream"
    document_mask: bool = True
    chunk_len: int | None = None
    blend_temperature: float | None = None
    on_exhausted: Literal["repeat", "stop"] = "repeat"
    prefetch_steps: int = 2


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with the paper's trapezoid (WSD) schedule (appendix B)."""

    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = 57
    decay_fraction: float = 0.2
    min_lr_ratio: float = 0.0
    aux_router_lr_multiplier: float = 10.0


@dataclass(frozen=True)
class RampConfig:
    """Batches of the steps before `until_step`; what isn't given is as in the rest of the run."""

    until_step: int
    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    seq_len: int | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Length and shape of the run. Batches are counted in sequences of `data.seq_len` tokens.

    `ramp` are stages at the start of the run with smaller batches or shorter sequences, in order. Give exactly one of
    `max_steps` and `max_tokens`. `stop_at_step` ends this launch early at a checkpoint without changing the schedule; a
    later launch goes on. Under activation checkpointing `selective`, the results of `selective_ops` are kept and the
    rest of each block is computed again. In bf16, the gradients of a shared weight are added up over the recursions in
    bf16, or with `add_shared_gradients_in_fp32` in fp32 and rounded once. A process that doesn't get on for
    `hang_timeout_seconds` leaves with the status that asks for another start; null: it waits for ever. With
    `fail_on_recompile_after`, a training step that compiles anything after so many steps of a launch ends the run.
    """

    global_batch_size: int = 1024
    micro_batch_size: int = 16
    max_steps: int | None = None
    max_tokens: int | None = None
    stop_at_step: int | None = None
    ramp: tuple[RampConfig, ...] = ()
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: Literal["none", "recursion", "block", "selective"] = "none"
    selective_ops: tuple[SelectiveOp, ...] = ("sdpa", "mm")
    add_shared_gradients_in_fp32: bool = False
    compile: bool = False
    fail_on_recompile_after: int | None = None
    eval_every: int = 500
    eval_sequences: int = 512
    hang_timeout_seconds: float | None = 540.0


@dataclass(frozen=True)
class ParallelConfig:
    """Who holds what. `auto` is `fsdp2` with more than one process, else `single`.

    FSDP2 shards over groups of `shard_degree` neighbouring processes and replicates over these groups (HSDP); unset
    means that all processes are one group. With the processes of a machine as a group, weights are gathered within it.
    """

    backend: Literal["auto", "single", "ddp", "fsdp2", "deepspeed"] = "auto"
    shard_degree: int | None = None
    zero_stage: Literal[0, 1, 2, 3] = 2
    reshard_after_forward: bool = True


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, whether training goes on meanwhile, and which complete checkpoints to keep.

    Kept are the newest `keep_last`, those of every `keep_every`-th step, and the `keep_best` with the lowest validation
    loss (under the inference rule, mean over the sets).
    """

    every_steps: int = 500
    asynchronous: bool = False
    keep_last: int = 3
    keep_every: int | None = None
    keep_best: int = 0


@dataclass(frozen=True)
class GuardConfig:
    """What happens when a step goes wrong. As it stands, a step that isn't finite ends the run, weights untouched.

    `skip_non_finite` goes on without such a step, as long as at most `max_skips_in_a_row` follow one another. With
    `spike_threshold`, losses more than so many standard deviations above the mean of the last `window` ones in
    `spike_steps` steps in a row send the run back to the newest checkpoint at least `rollback_steps` older; the data
    since then are left out. At most `max_rollbacks` times.
    """

    window: int = 100
    skip_non_finite: bool = False
    max_skips_in_a_row: int = 10
    spike_threshold: float | None = None
    spike_steps: int = 3
    rollback_steps: int = 100
    max_rollbacks: int = 3


@dataclass(frozen=True)
class DiagnosisConfig:
    """Alarms about the run, for a sign in `steps` steps in a row; `stop` ends it with an explanation.

    dead_router: no gradient at the router's scores. pinned_depth: a share of at least `pinned_share` of the tokens at
    one depth, where the router decides about depth. unigram_plateau: after `plateau_after_step`, losses within
    `plateau_margin` nats of the entropy of single tokens. exploding_norm: gradient norms more than `norm_factor` times
    the median of the guard's window.
    """

    steps: int = 100
    dead_router: Alarm = "stop"
    pinned_depth: Alarm = "warn"
    pinned_share: float = 0.9999
    unigram_plateau: Alarm = "warn"
    plateau_margin: float = 0.02
    plateau_after_step: int = 1000
    exploding_norm: Alarm = "warn"
    norm_factor: float = 100.0


@dataclass(frozen=True)
class MetricsConfig:
    """`metrics.jsonl` is always written; the rest is on request."""

    log_every: int = 1
    progress: bool = True
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "megamor"
    wandb_mode: Literal["online", "offline"] = "online"


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    recursion: RecursionConfig = field(default_factory=RecursionConfig)
    router: RouterConfig = field(default_factory=FixedDepthConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    diagnosis: DiagnosisConfig = field(default_factory=DiagnosisConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
