"""What a change of each setting means for a run that has begun, and the comparison of two configurations.

Every setting is in exactly one class; a test fails for a new one until it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megamor.config.convert import config_to_dict
from megamor.config.schema import Config


class Effect(Enum):
    """What a change of a setting does to a resumed run, as told to the user."""

    FUNCTION = "the weights were trained with the old value; allowed by checkpoint.allow_changes"
    """Changes what the weights compute: refused unless allowed by name."""
    ORDER = "the order of the samples depends on it"
    """The loader refuses it: its position in the data would mean nothing."""
    STATE = "the checkpoint has the moments of the other optimizer"
    """Refused: the moments can't be converted."""
    LENGTH = "the learning rate and the steps left follow below"
    BATCH = "steps of another size, from the first unseen sample on; the learning rate isn't scaled"
    DATA = "used from the first unseen sample on"
    OPTIMIZER = "used from the next step on; the moments are kept"
    ARITHMETIC = "how a step is computed: results agree within rounding"
    EVALUATION = "validation losses may not be comparable with earlier ones"
    WATCH = "used to judge the steps to come"
    START = "matters at the first start of a run only"
    NONE = "doesn't change the training"


_CLASSES: dict[Effect, str] = {
    Effect.FUNCTION: """
        model.vocab_size model.dim model.num_layers model.num_heads model.num_kv_heads model.ffn_dim model.max_seq_len
        model.head_width model.ffn_activation model.tied_head model.scale_embedding model.sandwich_norms
        model.rope_theta model.rope_scaling model.sliding_window model.sliding_layers model.sliding_rope_theta
        model.norm_eps model.qk_norm model.document_positions model.attention model.attention_window
        model.attention_block
        recursion.num_recursions recursion.sharing recursion.kv_policy recursion.recursion_embedding
        recursion.separate_norms recursion.lora_rank recursion.input_injection recursion.residual_scaling
        recursion.router_layers recursion.stages
        router.kind router.depth router.head router.activation router.alpha router.temperature router.gating
        router.gates router.capacity router.z_coeff router.capacity_warmup_steps router.sampling router.aux_coeff
        router.inference_threshold router.balancing router.balance_coeff router.bias_update_rate
        router.balance_warmup_steps router.ema_decay router.hidden router.depth_coeff router.target_depth
        router.temperature_start router.temperature_end router.temperature_steps router.mode router.epsilon
        router.ponder_coeff router.threshold router.target_flops router.prior router.gate router.routers
        router.granularity router.recursion_input router.recursion_rate router.target router.options
        data.tokenizer data.document_mask""",
    Effect.ORDER: "run.seed data.packing data.chunk_len",
    Effect.STATE: "optim.kind",
    Effect.LENGTH: """
        train.max_steps train.max_tokens train.max_flops
        optim.lr optim.schedule optim.warmup_steps optim.decay_fraction optim.decay_steps
        optim.min_lr_ratio""",
    Effect.BATCH: "train.global_batch_size train.ramp data.seq_len",
    Effect.DATA: "data.train data.blend_temperature data.on_exhausted",
    Effect.OPTIMIZER: """
        optim.beta1 optim.beta2 optim.eps optim.weight_decay optim.grad_clip optim.aux_router_lr_multiplier
        optim.router_lr_multiplier
        optim.average_decay optim.muon_lr_multiplier optim.muon_momentum optim.muon_nesterov optim.muon_steps
        recursion.schedule recursion.schedule_start recursion.schedule_steps recursion.backprop_recursions
        train.z_loss_coeff distill.from distill.weight distill.temperature distill.top_k""",
    Effect.ARITHMETIC: """
        train.micro_batch_size train.precision train.activation_checkpointing train.selective_ops
        train.add_shared_gradients_in_fp32 train.loss_kernel train.compile train.deterministic run.device
        parallel.backend parallel.shard_degree parallel.zero_stage parallel.reshard_after_forward
        parallel.deepspeed_config""",
    Effect.EVALUATION: """
        data.validation train.eval_every train.eval_sequences
        train.eval_tasks train.eval_tasks_every train.eval_tasks_limit train.eval_tasks_fewshot""",
    Effect.WATCH: """
        guard.window guard.skip_non_finite guard.max_skips_in_a_row guard.spike_threshold guard.spike_steps
        guard.rollback_steps guard.max_rollbacks
        diagnosis.steps diagnosis.dead_router diagnosis.pinned_depth diagnosis.pinned_share diagnosis.unigram_plateau
        diagnosis.plateau_margin diagnosis.plateau_after_step diagnosis.exploding_norm diagnosis.norm_factor
        diagnosis.stream_norm diagnosis.stream_factor""",
    Effect.START: """
        init.from init.allow_missing init.router init.lora init.average init.convert init.branch_from""",
    Effect.NONE: """
        run.name run.dir model.init_std data.prefetch_steps
        train.stop_at_step train.fail_on_recompile_after train.hang_timeout_seconds
        checkpoint.every_steps checkpoint.asynchronous checkpoint.keep_last checkpoint.keep_every checkpoint.keep_best
        checkpoint.resume_step checkpoint.allow_changes
        metrics.log_every metrics.progress metrics.tensorboard
        metrics.wandb metrics.wandb_mode metrics.wandb_project metrics.wandb_entity metrics.wandb_group
        metrics.wandb_job_type metrics.wandb_tags metrics.wandb_notes metrics.trackio metrics.trackio_project""",
}
SETTINGS: dict[str, Effect] = {name: effect for effect, names in _CLASSES.items() for name in names.split()}
"""Every setting by its dotted name; those of all routers are together."""


@dataclass(frozen=True)
class Change:
    """A setting that differs between a checkpoint and a launch."""

    name: str
    old: Any
    new: Any
    effect: Effect

    def __str__(self) -> str:
        """`optim.lr: 0.003 -> 0.001`; of two long lists only the items that differ."""
        old, new = self.old, self.new
        if isinstance(old, list) and isinstance(new, list) and len(old) + len(new) > 4:
            old, new = [item for item in old if item not in new], [item for item in new if item not in old]
        return f"{self.name}: {_shown(old)} -> {_shown(new)}"


def changes(old: Config, new: Config) -> list[Change]:
    """The settings that differ, in the order of the schema."""
    before, after = dict(_settings(config_to_dict(old))), dict(_settings(config_to_dict(new)))
    # A setting that only one of two kinds of router has says nothing beside the kind.
    names = [name for name in before if name in after and before[name] != after[name]]
    return [Change(name, before[name], after[name], SETTINGS[name]) for name in names]


def _settings(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, settings in values.items():
        yield from ((f"{section}.{name}", value) for name, value in settings.items())


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
