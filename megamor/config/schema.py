"""Every setting of a run, as frozen dataclasses. Defaults follow the recipe of arXiv 2507.10524 where it has one.

The string below a field is its documentation: docs/settings.md is generated from it. A setting whose name is a keyword
of Python has an underscore after it here (`convert.setting_name`). `load.py` reads configuration files, `convert.py`
checks them against the types declared here, `validate.py` checks the rules between settings, and `derive.py` computes
what follows from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from megamor.config.constraints import (
    BelowOne,
    ByKind,
    Fraction,
    NonNegative,
    NonNegativeInt,
    PathName,
    Positive,
    PositiveInt,
    ZeroStage,
)
from megamor.config.routers import FixedDepthConfig, RouterConfig

Sharing = Literal["none", "cycle", "sequence", "middle_cycle", "middle_sequence"]
KVPolicyName = Literal["recursion_wise", "share_first", "hybrid", "halted_reuse"]
SelectiveOp = Literal["sdpa", "mm", "silu"]
Alarm = Literal["off", "warn", "stop"]


@dataclass(frozen=True)
class RunConfig:
    """Name, location and seed."""

    name: str = "run"
    """Checkpoints and metrics are written to the directory `dir`/`name`."""
    dir: PathName = "runs"
    """Directory of all runs; on several machines, on a file system that all of them see."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto`: on the GPUs if there are any. GPUs that are there but can't be used are an
    error unless this is `cpu`."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights, the order of the data and the routers' noise."""


@dataclass(frozen=True)
class InitConfig:
    """What a new run starts from: by default weights drawn from `run.seed`. A run that has a checkpoint resumes from
    that and reads nothing of this section; see [Starting from weights](weights.md)."""

    from_: PathName | None = None
    """Weights to start from: a checkpoint of any backend, a run, an export, or a dense model in Hugging Face format
    (its directory, or `hf:` and its name). Optimizer, schedule, data and step count begin anew."""
    allow_missing: tuple[str, ...] = ()
    """Weights that only one of the models has, or has in another shape, by name or by the beginning of a name
    (`stage.router`). Those of this run's model are drawn anew, but a larger vocabulary keeps the source's rows."""
    router: Literal["load", "weights", "fresh"] = "load"
    """Routers: `load` all of their state, only their `weights` (thresholds, biases and averages begin anew), or none of
    it."""
    lora: Literal["load", "fresh"] = "load"
    """Low-rank updates of the recursions: `load`, or begin anew (`fresh`)."""
    average: bool = False
    """Take the source's moving average (`optim.average_decay`) in place of its weights."""
    convert: str | None = None
    """How a dense source becomes a model with shared layers: stepwise, average, lower, upper, or svd_lora with an
    optional rank (`svd_lora:64`); see `megamor convert-depth`."""
    branch_from: PathName | None = None
    """Continue another run from one of its checkpoints, RUN@STEP or RUN@latest, with this run's schedule: optimizer,
    data and step count continue. RUN is the run's directory."""


@dataclass(frozen=True)
class DistillConfig:
    """A teacher whose predictions are learned beside the data's next tokens."""

    from_: PathName | None = None
    """The teacher: what `init.from` may be. It has the same vocabulary; every process holds all of it."""
    weight: Positive = 1.0
    """Factor on the Kullback-Leibler divergence of the student's predictions from the teacher's, in nats per token."""
    temperature: Positive = 1.0
    """Divides the logits of both; the divergence is multiplied by its square (arXiv 1503.02531)."""
    top_k: PositiveInt | None = None
    """Compare the teacher's so many likeliest tokens and, as one more, all others together; null: every token."""


@dataclass(frozen=True)
class RopeScalingConfig:
    """Llama 3's stretching of RoPE to longer contexts: low frequencies are divided by `factor`, high ones kept."""

    factor: Positive
    """By how much the context grew."""
    low_freq_factor: Positive = 1.0
    """Frequencies of fewer turns than this in `original_max_seq_len` positions are divided."""
    high_freq_factor: Positive = 4.0
    """Frequencies of more turns than this are kept; those between are interpolated."""
    original_max_seq_len: PositiveInt = 8192
    """The context that the model was first trained with."""


@dataclass(frozen=True)
class ModelConfig:
    """Llama backbone (paper section 3), without biases and dropout, and what related families do differently."""

    vocab_size: PositiveInt = 49152
    """Rows of the embedding; at least the size of the tokenizer's vocabulary."""
    dim: PositiveInt = 576
    """Width of the residual stream."""
    num_layers: PositiveInt = 30
    """Effective depth: the number of blocks that a token passes through at full depth. With `recursion.stages` or
    `recursion.router_layers`: the number of unique blocks."""
    num_heads: PositiveInt = 9
    """Query heads; `dim` is split evenly among them unless `head_width` is given."""
    num_kv_heads: PositiveInt = 3
    """Key and value heads (grouped-query attention); a divisor of `num_heads`."""
    head_width: PositiveInt | None = None
    """Width of an attention head; null: `dim` / `num_heads`."""
    ffn_dim: PositiveInt = 1536
    """Width of the feed-forward network's hidden layer."""
    ffn_activation: Literal["silu", "gelu_tanh"] = "silu"
    """Activation of its gate: SwiGLU (`silu`), or GeGLU with GELU's tanh approximation, as in Gemma."""
    tied_head: bool = True
    """Whether the output head is the embedding, or a matrix of its own."""
    scale_embedding: bool = False
    """Multiply embedded tokens by the square root of `dim`, as Gemma does."""
    sandwich_norms: bool = False
    """Normalise what attention and feed-forward add to the stream too, as Gemma 3 does."""
    max_seq_len: PositiveInt = 2048
    """Longest sequence that the model accepts."""
    rope_theta: Positive = 10000.0
    """Base of the rotary position embeddings."""
    rope_scaling: RopeScalingConfig | None = None
    """Llama 3's stretching of RoPE; null: none."""
    sliding_window: PositiveInt | None = None
    """Tokens that a block of `sliding_layers` sees, its own included."""
    sliding_layers: tuple[NonNegativeInt, ...] = ()
    """Layers (from 0) whose attention is limited to `sliding_window`. A shared block is limited in all its applications
    if it first runs as one of them."""
    sliding_rope_theta: Positive | None = None
    """Base of the rotary position embeddings there, without `rope_scaling`; null: `rope_theta`, with it."""
    norm_eps: Positive = 1e-5
    """Epsilon of RMSNorm."""
    init_std: Positive = 0.02
    """Standard deviation of the initial weights."""
    qk_norm: bool = False
    """Normalise queries and keys (RMSNorm over each head, learned weights) before RoPE, as Qwen3 and OLMo 2 do."""
    document_positions: Literal["continue", "restart"] = "continue"
    """Whether positions restart at each document; matters with `data.document_mask` only."""
    attention: Literal["full", "multi_scale"] = "full"
    """Keys that a token sees: all earlier ones (`full`), or recent ones and the means of older blocks (`multi_scale`);
    see [Architecture](architecture.md#multi-scale-attention)."""
    attention_window: PositiveInt = 256
    """`multi_scale`: earlier tokens seen one by one, besides those of a token's own block; a multiple of
    `attention_block`."""
    attention_block: PositiveInt = 16
    """`multi_scale`: positions per block."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.dim // self.num_heads


@dataclass(frozen=True)
class DepthStep:
    """A number of recursions and where it begins, as an item of `recursion.schedule_steps`."""

    at: Fraction
    """Fraction of the run's steps, tokens or FLOPs, whichever limits it; the first item has 0."""
    recursions: PositiveInt
    """Most recursions of a token from there on."""


@dataclass(frozen=True)
class StageConfig:
    """A recursion stage of a model that has several. What it leaves out has the value that `recursion` has; `router`
    adds to the section `router`, unless it is of another kind."""

    first_layer: NonNegativeInt
    """The first of its layers, counted from 0."""
    num_layers: PositiveInt = 1
    """Number of its layers."""
    num_recursions: PositiveInt | None = None
    """As in `recursion`."""
    sharing: Literal["cycle", "sequence"] = "cycle"
    """Order of its layers: all of them repeat (`cycle`), or each of them (`sequence`)."""
    kv_policy: KVPolicyName | None = None
    """As in `recursion`."""
    recursion_embedding: bool | None = None
    """As in `recursion`."""
    separate_norms: bool | None = None
    """As in `recursion`."""
    lora_rank: NonNegativeInt | None = None
    """As in `recursion`."""
    router: Annotated[RouterConfig, ByKind()] | None = None
    """The stage's router."""


@dataclass(frozen=True)
class RecursionConfig:
    """How layers are shared (paper section 2.2.1, table 1). One recursion with `sharing: none` is a vanilla model.

    By default all recursions of a shared block use the same parameters. With `recursion_embedding`, `separate_norms` or
    `lora_rank` each recursion also has some of its own.
    """

    num_recursions: PositiveInt = 1
    """How often the shared core is applied at full depth (Nr)."""
    sharing: Sharing = "none"
    """Order of the shared layers: the core as a whole repeats (`cycle`), or each of its layers (`sequence`). The
    `middle_` variants keep the first and the last layer unshared."""
    kv_policy: KVPolicyName = "recursion_wise"
    """Keys and values that a recursion attends to (paper section 2.2.2): those of its own tokens, those of the first
    recursion, or the latter updated with its own tokens' (`hybrid`); with `halted_reuse` (arXiv 2603.01914) those of
    each token's last recursion so far."""
    recursion_embedding: bool = False
    """Add a learned vector per recursion to the core's input."""
    separate_norms: bool = False
    """Give each recursion its own norms."""
    lora_rank: NonNegativeInt = 0
    """Rank of the low-rank update that each recursion adds to the shared matrices (arXiv 2410.20672); 0: none."""
    router_layers: tuple[NonNegativeInt, ...] = ()
    """Layers (from 0) each of which is a recursion stage of its own, with the settings of this section and of `router`;
    `stages` changes them for some."""
    stages: tuple[StageConfig, ...] = ()
    """Recursion stages of a model that has several; layers in none of them aren't shared. `sharing` stays `none`."""
    input_injection: bool = False
    """Let the core's input be a·x + b·x0, where x0 entered the first recursion. Each recursion learns its own a and b,
    which start at 1 and 0."""
    residual_scaling: Literal["none", "inverse_sqrt", "inverse"] = "none"
    """Factor on what shared blocks add to the stream: 1/sqrt(Nr), or 1/Nr (arXiv 2606.18524), since the updates of tied
    layers add up in one direction."""
    schedule: Literal["constant", "steps", "linear", "1-sqrt", "sampled"] = "constant"
    """Most recursions of a token in each training step: always Nr, growing with the fraction of the run, or drawn
    uniformly for each step; see [Training](training.md#growing-and-sampled-depth)."""
    schedule_start: PositiveInt = 1
    """Where `linear` and `1-sqrt` begin, and the fewest recursions that `sampled` draws."""
    schedule_steps: tuple[DepthStep, ...] = ()
    """The schedule `steps`."""
    backprop_recursions: PositiveInt | None = None
    """Backpropagate through the last so many recursions of a pass only; null: through all."""


@dataclass(frozen=True)
class SourceConfig:
    """A training data set. An item may also be the bare prefix."""

    prefix: PathName
    """Path of the pair `<prefix>.bin` and `<prefix>.idx`."""
    weight: Positive = 1.0
    """Fraction of the samples, relative to the weights of the other sources."""
    tokens: Positive | None = None
    """Instead of the weight: a token budget, relative to the budgets of the other sources."""


@dataclass(frozen=True)
class DataConfig:
    """Training and validation data: shards, and how sequences are made of them; see [Data](data.md)."""

    train: tuple[SourceConfig, ...] = ()
    """Training data sets."""
    validation: Mapping[str, PathName] = field(default_factory=dict)
    """Validation sets: the name used in metrics, and the prefix."""
    tokenizer: PathName | None = None
    """The `tokenizer.json` that wrote the shards; it is copied into every checkpoint."""
    seq_len: PositiveInt = 2048
    """Tokens per training sequence."""
    packing: Literal["stream", "best_fit", "document"] = "stream"
    """What a training sequence holds: consecutive documents cut anywhere (`stream`), whole documents and padding
    (`best_fit`), or one document and padding."""
    document_mask: bool = True
    """Keep attention within each document."""
    chunk_len: PositiveInt | None = None
    """Tokens per chunk; shuffling moves whole chunks. Null: the `seq_len` of the first step. Should not be shorter than
    any `seq_len` of the run."""
    blend_temperature: Positive | None = None
    """Multiply each source's weight by size^(1/T)."""
    on_exhausted: Literal["repeat", "stop"] = "repeat"
    """When a source has been read to its end, read it again or end the run."""
    prefetch_steps: NonNegativeInt = 2
    """Batches prepared ahead of the step that uses them."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the learning-rate schedule (AdamW and `wsd`: paper appendix B)."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the projections of attention and SwiGLU, AdamW for the rest; see
    [Training](training.md#optimizer). Not with DeepSpeed."""
    lr: Positive = 3e-3
    """Peak learning rate."""
    beta1: BelowOne = 0.9
    """Decay of the first moment."""
    beta2: BelowOne = 0.95
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """Added to the denominator of the update."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of the matrices."""
    grad_clip: Positive = 1.0
    """Largest global gradient norm; longer gradients are scaled down to it."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """Shape after the warm-up: constant with a linear decay at the end (`wsd`), half a cosine, or constant."""
    warmup_steps: NonNegativeInt = 57
    """Steps over which the learning rate rises linearly from 0."""
    decay_fraction: Fraction = 0.2
    """Fraction of the run over which `wsd` decays."""
    decay_steps: NonNegativeInt | None = None
    """The same as a number of steps, in place of `decay_fraction`; such as those of a cool-down."""
    min_lr_ratio: Fraction = 0.0
    """Learning rate at the end of the decay, as a fraction of the peak."""
    router_lr_multiplier: Positive = 1.0
    """Factor on the learning rate of routers."""
    aux_router_lr_multiplier: Positive = 10.0
    """Factor on the learning rate of auxiliary routers."""
    average_decay: BelowOne | None = None
    """Keep a moving average of the weights with this decay per step, such as 0.999, evaluated beside them; null: none.
    `megamor merge --average` makes a checkpoint of it."""
    muon_lr_multiplier: Positive = 1.0
    """Factor on the learning rate of Muon's matrices. At 1 their updates are about as large as AdamW's."""
    muon_momentum: BelowOne = 0.95
    """Decay of Muon's momentum."""
    muon_nesterov: bool = True
    """Nesterov momentum: the gradient is added to the decayed momentum once more."""
    muon_steps: PositiveInt = 5
    """Newton-Schulz iterations of Muon's orthogonalisation."""


@dataclass(frozen=True)
class RampConfig:
    """A stage at the start of the run. What a stage leaves out has the run's final value."""

    until_step: PositiveInt
    """Step at which the stage ends; stages are listed in ascending order."""
    global_batch_size: PositiveInt | None = None
    """As in `train`."""
    micro_batch_size: PositiveInt | None = None
    """As in `train`."""
    seq_len: PositiveInt | None = None
    """As in `data`; at most its value."""


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run, batch, precision and memory. Exactly one of `max_steps`, `max_tokens` and `max_flops` is
    required."""

    global_batch_size: PositiveInt = 1024
    """Sequences per optimizer step, over all processes; a multiple of `micro_batch_size` x processes."""
    micro_batch_size: PositiveInt = 16
    """Sequences that a process computes at a time; gradients accumulate until the global batch is complete."""
    max_steps: PositiveInt | None = None
    """Optimizer steps of the run."""
    max_tokens: PositiveInt | None = None
    """Training tokens of the run, padding not counted. It ends with the first step that reaches them, whatever changed
    on the way. Unless packing is `stream`, the learning rate follows the fraction of them that has been used."""
    max_flops: Positive | None = None
    """Executed training FLOPs of the run (`throughput/executed_flops`). It ends with the first step that reaches them,
    and the learning rate follows the fraction of them that has been used."""
    stop_at_step: PositiveInt | None = None
    """Save and stop at this step; the schedule stays that of the whole run, and a later start resumes it."""
    ramp: tuple[RampConfig, ...] = ()
    """Stages at the start of the run with smaller batches or shorter sequences."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of the computation; weights, moments and gradient reductions are fp32 in either case."""
    activation_checkpointing: Literal["none", "recursion", "block", "selective"] = "none"
    """What is recomputed in the backward pass to save memory: nothing, whole recursions, whole blocks, or all of a
    block but the results of `selective_ops`."""
    selective_ops: tuple[SelectiveOp, ...] = ("sdpa", "mm")
    """Results that `selective` keeps: attention (`sdpa`), projections (`mm`), SwiGLU's activation (`silu`)."""
    add_shared_gradients_in_fp32: bool = False
    """Add up the gradients of a shared weight over the recursions in fp32 instead of bf16."""
    z_loss_coeff: NonNegative = 0.0
    """Weight of the loss that keeps the logits' normaliser small: mean squared logsumexp (arXiv 2204.02311)."""
    loss_kernel: Literal["auto", "reference", "triton", "torch"] = "auto"
    """Code of the cross-entropy: plain operations (`reference`), a kernel for GPUs (`triton`), or torch's
    `linear_cross_entropy` (`torch`, from 2.13 on; no z-loss). `auto` measures `triton` and `torch` at the start on a
    GPU, keeps the choice when the run is resumed, and is `reference` elsewhere."""
    compile: Literal["auto", True, False] = False
    """Compile each block with torch.compile; `auto`: on GPUs."""
    deterministic: bool = False
    """Use deterministic algorithms only, so that a resumed run is bitwise the uninterrupted one on GPUs too; slower. An
    operation that has none ends the run. See [GPUs](gpu.md#bitwise-or-not)."""
    fail_on_recompile_after: PositiveInt | None = None
    """End the run if a training step compiles anything later than this many steps after the start."""
    eval_every: PositiveInt = 500
    """Steps between validations; there is one at the end too."""
    eval_sequences: PositiveInt = 512
    """Sequences of each validation set that a validation reads, at most."""
    eval_tasks: tuple[str, ...] = ()
    """Downstream tasks to evaluate during training: names that `megamor evaluate --tasks` knows, or YAML files."""
    eval_tasks_every: PositiveInt | None = None
    """Steps between evaluations of `eval_tasks`; there is one at the end too. null: those of `eval_every`."""
    eval_tasks_limit: PositiveInt | None = None
    """Documents of each task to use, at most; null: all."""
    eval_tasks_fewshot: NonNegativeInt | None = None
    """Examples in front of each question; null: as many as the task says."""
    hang_timeout_seconds: Positive | None = 540.0
    """A rank that makes no progress for this long exits with the requeue status (75); null disables the watchdog."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is distributed over processes; see [Training](training.md#backends)."""

    backend: Literal["auto", "single", "ddp", "fsdp2", "deepspeed"] = "auto"
    """`auto` is `single` with one process on a CPU, and otherwise `fsdp2`."""
    shard_degree: PositiveInt | None = None
    """FSDP2 shards over groups of this many neighbouring processes and replicates over the groups (HSDP); null: the
    processes of a machine are a group, or all processes if weights, gradients and moments divided over one machine
    would take more than half of a device's memory. The number of all processes shards over all of them."""
    zero_stage: ZeroStage = 2
    """DeepSpeed: what is sharded; 1: optimizer state, 2: gradients too, 3: weights too."""
    deepspeed_config: PathName | None = None
    """DeepSpeed: a JSON file with further settings of its engine, such as offloading; see
    [Training](training.md#a-deepspeed-file-of-your-own)."""
    reshard_after_forward: bool = True
    """FSDP2: free the gathered weights after the forward pass and gather them again for the backward pass."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and which checkpoints to keep; see [Checkpoints](checkpoints.md)."""

    every_steps: PositiveInt = 500
    """Steps between checkpoints; the last step is saved too."""
    asynchronous: bool = False
    """Write in the background while training continues."""
    keep_last: PositiveInt = 3
    """Keep this many of the newest checkpoints."""
    keep_every: PositiveInt | None = None
    """Also keep the checkpoints whose step is a multiple of this."""
    keep_best: NonNegativeInt = 0
    """Also keep this many with the lowest validation loss (under the inference rule, mean over the sets)."""
    resume_step: PositiveInt | None = None
    """Resume from the checkpoint of this step instead of the newest one. Later ones are set aside, not deleted. This is
    done once: if the same command is rerun, it resumes from the newest checkpoint made since."""
    allow_changes: tuple[str, ...] = ()
    """Settings that a resumed run may change although they change what the model computes, such as `router.alpha`."""


@dataclass(frozen=True)
class GuardConfig:
    """What happens when a step goes wrong. By default a loss or gradient that isn't finite ends the run, and the
    weights keep their values."""

    window: PositiveInt = 100
    """Recent losses and gradient norms that a new one is compared with."""
    skip_non_finite: bool = False
    """Skip a step whose gradient isn't finite instead of ending the run."""
    max_skips_in_a_row: PositiveInt = 10
    """End the run when more consecutive steps than this had to be skipped."""
    spike_threshold: Positive | None = None
    """A loss this many standard deviations above the mean of the window is a spike; null: losses aren't checked."""
    spike_steps: PositiveInt = 3
    """Roll back after this many spikes in a row."""
    rollback_steps: PositiveInt = 100
    """Roll back to the newest checkpoint that is at least this many steps older; the data read since are left out."""
    max_rollbacks: NonNegativeInt = 3
    """End the run at the next spike after this many rollbacks."""


@dataclass(frozen=True)
class DiagnosisConfig:
    """Alarms: `warn` prints a warning, `stop` ends the run with an explanation; see
    [Training](training.md#alarms)."""

    steps: PositiveInt = 100
    """Consecutive steps that must show a symptom before its alarm is raised."""
    dead_router: Alarm = "stop"
    """No gradient reaches the router's scores."""
    pinned_depth: Alarm = "warn"
    """Nearly all tokens take the same depth (routers that decide about depth only)."""
    pinned_share: Fraction = 0.9999
    """Fraction of the tokens at one depth that raises `pinned_depth`."""
    unigram_plateau: Alarm = "warn"
    """The loss stays at the entropy of single tokens: the model ignores the context."""
    plateau_margin: Positive = 0.02
    """Distance from that entropy, in nats, that raises `unigram_plateau`."""
    plateau_after_step: NonNegativeInt = 1000
    """First step at which `unigram_plateau` is checked."""
    exploding_norm: Alarm = "warn"
    """The gradient norm is far above its usual value."""
    norm_factor: Positive = 100.0
    """Multiple of the median norm in the guard's window that raises `exploding_norm`."""
    stream_norm: Alarm = "warn"
    """The recursions blow the residual stream up."""
    stream_factor: Positive = 100.0
    """Multiple of the stream's norm before the first recursion that raises `stream_norm`."""


@dataclass(frozen=True)
class MetricsConfig:
    """Where metrics go. `metrics.jsonl` in the run's directory is always written."""

    log_every: PositiveInt = 1
    """Steps between records."""
    progress: bool = True
    """Show progress on the terminal."""
    tensorboard: bool = False
    """Write TensorBoard files."""
    wandb: bool = False
    """Send to Weights & Biases."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """`offline` keeps the records for `wandb sync`. Null: wandb's own choice (`WANDB_MODE`)."""
    wandb_project: str | None = None
    """Project at Weights & Biases. Null: `WANDB_PROJECT`, else `megamor`."""
    wandb_entity: str | None = None
    """User or team at Weights & Biases. Null: wandb's own choice, as for the following."""
    wandb_group: str | None = None
    """Group of runs that this run belongs to."""
    wandb_job_type: str | None = None
    """Kind of run within the group."""
    wandb_tags: tuple[str, ...] = ()
    """Tags of the run."""
    wandb_notes: str | None = None
    """Description of the run."""
    trackio: bool = False
    """Send to Trackio, if it is installed."""
    trackio_project: str = "megamor"
    """Project in Trackio."""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    init: InitConfig = field(default_factory=InitConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    recursion: RecursionConfig = field(default_factory=RecursionConfig)
    router: Annotated[RouterConfig, ByKind()] = field(default_factory=FixedDepthConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    diagnosis: DiagnosisConfig = field(default_factory=DiagnosisConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
