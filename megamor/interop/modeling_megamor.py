"""megamor's model behind the interface of Hugging Face transformers.

Nothing in megamor imports this file: `export.py` copies it, with the modules that it needs, into every exported
directory, where `from_pretrained(..., trust_remote_code=True)` loads it. What it can't do it refuses by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from megamor.config.routers import RouterConfig
from megamor.config.schema import (
    Config,
    DataConfig,
    DepthStep,
    ModelConfig,
    RecursionConfig,
    RopeScalingConfig,
    StageConfig,
)
from megamor.model import KVCache, Transformer
from megamor.model.loss import IGNORE

GENERATION_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")


class MegamorConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """`megamor` holds the sections model, recursion, router and data of the run's configuration.

    The size of the vocabulary is `vocab_size` alone, which `resize_token_embeddings` changes.
    """

    model_type = "megamor"
    use_cache: bool = True
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012


class DecodingCache:
    """A `KVCache` with the methods that `generate()` calls."""

    is_compileable = is_croppable = False

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def get_seq_length(self, *_: Any) -> int:
        """Number of tokens in the cache, padding included."""
        return self.cache.num_tokens

    def reorder_cache(self, beams: Tensor) -> None:
        """Beam search: sequence i becomes a continuation of sequence `beams[i]`."""
        self.cache.select(beams)


class MegamorModel(Transformer):
    """`Transformer` under its router's inference rule, with the arguments that transformers and TRL pass."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """States [B, S, dim] after the final norm; the rest as in `MegamorForCausalLM.forward`.

        Without `use_cache`, a cache is returned outside of training if it can hold the tokens.
        """
        inputs = self.checked_inputs(input_ids, inputs_embeds, past_key_values, options)
        batch, length = inputs.shape[:2]
        given, first = (attention_mask, position_ids, batch, length), past_key_values is None
        if first and use_cache is not False and (use_cache or not self.training):
            past_key_values = self.new_cache(batch, length)
        try:
            real, documents = self.layout(*given, past_key_values)
        except ValueError:
            if use_cache or not first:
                raise
            # Without being asked for, a cache is made only if it can hold these tokens.
            past_key_values = None
            real, documents = self.layout(*given, None)
        lengths = columns = None
        if real is not None:
            numbers = torch.stack((real.sum(1), real.long().argmax(1))).tolist()
            lengths, columns = (tuple(row) for row in numbers)
        states: list[Tensor] | None = [] if output_hidden_states else None
        out = super().forward(
            inputs,
            mode="causal",
            documents=documents,
            cache=None if past_key_values is None else past_key_values.cache,
            lengths=lengths,
            columns=columns,
            predict=False,
            states=states,
        )
        # A row for each real token; the states of padding are 0.
        hidden, rows = self.embed.weight.new_zeros(batch, length, self.config.model.dim), out.hidden
        if rows is not None and real is None:
            hidden = rows.view_as(hidden)
        elif rows is not None and real is not None:
            hidden = hidden.to(rows.dtype).masked_scatter(real.to(rows.device).unsqueeze(-1), rows)
        return BaseModelOutputWithPast(hidden, past_key_values, None if states is None else tuple(states))

    def layout(
        self, mask: Tensor | None, position_ids: Tensor | None, batch: int, length: int, past: DecodingCache | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """`real_tokens` and `documents_of`, after the cache has made room. Raises ValueError as they do."""
        cache = None if past is None else past.cache
        if cache is not None and cache.num_tokens + length > cache.capacity:
            most, needed = self.config.model.max_seq_len, cache.num_tokens + length
            if needed > most:
                raise ValueError(
                    f"the cache holds {most} tokens (max_position_embeddings), and {needed} are needed: generate "
                    "fewer, or pass use_cache=False"
                )
            cache.grow(min(most, 2 * needed))
        real = real_tokens(mask, batch, length, cache)
        return real, None if position_ids is None else documents_of(position_ids, real, batch, length, cache)

    def new_cache(self, batch: int, capacity: int) -> DecodingCache:
        """An empty cache for `batch` sequences of `capacity` tokens, or as many as the model was made for."""
        weight, config = self.embed.weight, self.config.model
        return DecodingCache(KVCache(config, batch, min(capacity, config.max_seq_len), weight.dtype, weight.device))

    def checked_inputs(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, past: Any, options: Mapping[str, Any]
    ) -> Tensor:
        """`input_ids` or `inputs_embeds`, whichever is given. Raises ValueError for what `forward` doesn't support."""
        for name, value in options.items():
            if value is not None and value is not False:
                raise ValueError(f"{name} isn't supported by this model: leave it out")
        if past is not None and not isinstance(past, DecodingCache):
            kind = type(past).__name__
            raise ValueError(
                f"past_key_values of type {kind} isn't supported: pass use_cache=True, which returns a cache"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is not None and any(stage.router.reads_text for stage in self.stages.values()):
            raise ValueError("inputs_embeds isn't supported: the model's router reads the text; give input_ids")
        inputs: Tensor = inputs_embeds if input_ids is None else input_ids  # type: ignore[assignment]
        if inputs.dim() != (2 if inputs_embeds is None else 3) or not inputs.shape[1]:
            shape = list(inputs.shape)
            raise ValueError(f"inputs of shape {shape} aren't supported: give [sequences, tokens], at least one token")
        return inputs


class MegamorForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """`Transformer` under its router's inference rule, which is causal; this holds in training mode too."""

    config_class = MegamorConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _supports_sdpa = True
    # Geometry and layouts hold tensors that hooks wouldn't move, so the whole model is on one device.
    _no_split_modules = ["MegamorModel"]  # noqa: RUF012
    # Scores that nearly tie can change order when rounded to bf16, and then tokens take another depth.
    _keep_in_fp32_modules_strict = {"router"}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.set_attn_implementation(config._attn_implementation)
        self.model = MegamorModel(settings(config.megamor, config.vocab_size))
        # from_pretrained builds on the meta device and fills in the stored weights; from_config expects initial ones.
        if not self.model.embed.weight.is_meta:
            self.model.init_weights()
        # What others look for is a module that is the head. Where the embedding is the head, it has the same weight.
        self.lm_head: Any = None
        if self.model.head is None:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
            self.lm_head.weight = self.model.embed.weight
            self._tied_weights_keys = {"lm_head.weight": "model.embed.weight"}
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: Any) -> None:
        """Initialise the rows that `resize_token_embeddings` adds; `__init__` has initialised everything else."""
        if isinstance(module, nn.Embedding) or module is self.model.head:
            nn.init.normal_(module.weight, std=self.model.config.model.init_std)

    def set_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> None:
        """Refuse everything but "sdpa": which kernels run depends on the layout of the tokens."""
        if attn_implementation not in (None, "sdpa"):
            raise ValueError(
                f"attn_implementation = {attn_implementation!r} isn't supported: leave it out, or give sdpa"
            )

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, every_n_layers: int = 1, **__: Any) -> None:
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers = {every_n_layers} isn't supported: all blocks are checkpointed, or none")
        self.gradient_checkpointing = enable
        self.model.set_activation_checkpointing("block" if enable else "none")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # recursions hold different numbers of keys and values, so `DecodingCache` is used instead

    def get_input_embeddings(self) -> Any:
        return self.model.embed

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embed = value

    def get_output_embeddings(self) -> Any:
        return self.lm_head or self.model.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        if self.lm_head is None:
            self.model.head = new_embeddings
        else:
            self.lm_head = new_embeddings

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, generation_mode: Any, batch_size: int, max_length: int
    ) -> Any:
        """Refuse what `generate` could not do with this model, and give it a cache."""
        if generation_mode.value not in GENERATION_MODES:
            raise ValueError(
                f"{generation_mode.value} isn't supported: leave out assistant_model, prompt_lookup_num_tokens, "
                f"penalty_alpha and the like. Supported are {', '.join(GENERATION_MODES)}"
            )
        name = generation_config.cache_implementation
        if name is not None:
            raise ValueError(
                f"cache_implementation = {name!r} isn't supported: the model has its own cache; leave it out"
            )
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and bool((mask[:, -1] == 0).any()):
            raise ValueError(
                "a prompt must end with a token: set tokenizer.padding_side = 'left', leave out empty prompts"
            )
        embeds = model_kwargs.get("inputs_embeds") is not None
        if embeds and (not generation_config.use_cache or generation_config.prefill_chunk_size):
            raise ValueError(
                "generate() from inputs_embeds needs the cache and the prompt as a whole: leave out use_cache=False "
                "and prefill_chunk_size"
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            model_kwargs["past_key_values"] = self.model.new_cache(batch_size * copies, max_length + 1)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Any,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        is_first_iteration: bool | None = None,
        cache_position: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        kwargs["past_key_values"] = past_key_values
        if inputs_embeds is not None and start == 0:
            return {"inputs_embeds": inputs_embeds, **kwargs}
        if next_sequence_length is not None:
            start = input_ids.shape[1] - next_sequence_length
        elif input_ids.shape[1] <= start:  # a chunk of a long prompt
            start = 0
        return {"input_ids": input_ids[:, start:], **kwargs}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Any = None,
        **options: Any,
    ) -> Any:
        """Logits [B, S, vocabulary] of `input_ids` [B, S] or `inputs_embeds` [B, S, dim], and the loss of `labels`.

        The loss compares position t with label t + 1; labels of -100 are ignored, and so is padding. It is the mean or,
        with `num_items_in_batch`, the sum divided by that. `attention_mask` [B, tokens so far and new] is 0 at padding,
        whose logits are 0. `position_ids` count each sequence's tokens; where they begin again at 0, another document
        begins, which attention doesn't leave. A cache is returned if `use_cache` is true; if it isn't given, as the
        configuration says, except in training, with labels and for tokens that no cache can hold. `hidden_states` are
        the stream after the embedding and after each unshared block and each recursion; the last one is that after the
        final norm.

        Raises:
            ValueError: an option isn't supported, inputs contradict each other, or the cache is too small.
        """
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("logits_to_keep and labels contradict each other: the loss needs all logits")
        if use_cache is None and (labels is not None or self.gradient_checkpointing or not self.config.use_cache):
            use_cache = False
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            **options,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            targets = F.pad(labels, (0, 1), value=IGNORE)[:, 1:].to(logits.device)
            if attention_mask is not None:  # a token is predicted from the token before it, not from padding
                real = attention_mask[:, -labels.shape[1] :].to(logits.device) != 0
                targets = targets.masked_fill(~(real & F.pad(real, (0, 1))[:, 1:]), IGNORE)
            reduction = "mean" if num_items_in_batch is None else "sum"
            logits_NV = logits.flatten(0, 1).float()
            loss = F.cross_entropy(logits_NV, targets.flatten(), ignore_index=IGNORE, reduction=reduction)
            if num_items_in_batch is not None:
                loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device)
        output = CausalLMOutputWithPast(loss, logits, out.past_key_values, out.hidden_states)
        return output.to_tuple() if return_dict is False else output


def real_tokens(mask: Tensor | None, batch: int, length: int, cache: KVCache | None) -> Tensor | None:
    """Which of the newest `length` tokens of each sequence are no padding, [batch, length]; None: all.

    Raises:
        ValueError: `mask` has another shape, a hole, or padding where a cache can't have it.
    """
    if mask is None:
        return None
    past = 0 if cache is None else cache.num_tokens
    if getattr(mask, "shape", None) != (batch, past + length):
        given = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask of shape {given} isn't supported: give [sequences, tokens so far and new], "
            f"here {[batch, past + length]}"
        )
    real = mask != 0
    begins = torch.cat((real[:, :1], real[:, 1:] & ~real[:, :-1]), 1)
    if bool((begins.sum(1) > 1).any()):
        raise ValueError("attention_mask has a hole: padding may only be before or after all tokens of a sequence")
    padding = 0 if cache is None or cache.padding is None else cache.padding
    if bool((past - real[:, :past].sum(1) != padding).any()):
        raise ValueError("attention_mask hides other tokens than it did when the cache was filled")
    real = real[:, past:]
    if cache is not None and bool((real.any(1) & ~real[:, -1]).any() | ~real.any()):
        raise ValueError("with a cache, padding must come before the tokens: set tokenizer.padding_side = 'left'")
    return None if bool(real.all()) else real


def documents_of(
    position_ids: Tensor, real: Tensor | None, batch: int, length: int, cache: KVCache | None
) -> Tensor | None:
    """Ids [batch, length] of the documents that begin where `position_ids` are 0; None: one in each sequence.

    Raises:
        ValueError: positions neither continue nor begin again at 0, or aren't those of the tokens after a cache's.
    """
    if position_ids.shape[-1] < length or (position_ids.dim() > 1 and position_ids.shape[:-1] not in ((1,), (batch,))):
        raise ValueError(
            f"position_ids of shape {list(position_ids.shape)} aren't supported: give those of the new tokens, here "
            f"{[batch, length]}"
        )
    given = position_ids[..., -length:].expand(batch, -1)
    real = torch.ones_like(given, dtype=torch.bool) if real is None else real.to(given.device)
    continues = given[:, 1:] == given[:, :-1] + 1
    begins = real & (given == 0)
    allowed = continues | begins[:, 1:] | ~(real[:, 1:] & real[:, :-1])
    if cache is not None:
        # RoPE sees distances alone, so positions may count the padding or not.
        padding = torch.zeros(batch, dtype=torch.int64) if cache.padding is None else cache.padding
        order = real.cumsum(1) - 1 + (cache.num_tokens - padding).to(given.device).unsqueeze(1)
        columns = torch.arange(length, device=given.device) + cache.num_tokens
        allowed = (given == order) | (given == columns) | ~real
    if not bool(allowed.all()):
        raise ValueError(
            "position_ids must count the tokens of each sequence; without a cache they may begin again at 0"
        )
    documents = begins.cumsum(1)
    return documents if cache is None and bool((begins[:, 1:] & real[:, :-1]).any()) else None


def settings(sections: Mapping[str, Mapping[str, Any]], vocab_size: int) -> Config:
    """The `Config` whose sections were exported. They were validated when the model was trained."""
    model, recursion = hashable({**sections["model"], "vocab_size": vocab_size}), hashable(sections["recursion"])
    if model.get("rope_scaling"):
        model["rope_scaling"] = RopeScalingConfig(**model["rope_scaling"])
    recursion["schedule_steps"] = tuple(DepthStep(**item) for item in recursion.get("schedule_steps", ()))
    recursion["stages"] = tuple(
        StageConfig(**{**item, "router": item.get("router") and router_config(item["router"])})
        for item in recursion.get("stages", ())
    )
    return Config(
        model=ModelConfig(**model),
        recursion=RecursionConfig(**recursion),
        router=router_config(sections["router"]),
        data=DataConfig(**sections["data"]),
    )


def router_config(fields: Mapping[str, Any]) -> Any:
    """The settings of a router, of the class that `kind` names."""
    routers = {router.kind: router for router in get_args(RouterConfig) if hasattr(router, "kind")}
    return routers[fields["kind"]](**hashable(fields))


def hashable(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with tuples for lists, which is what JSON makes of them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
