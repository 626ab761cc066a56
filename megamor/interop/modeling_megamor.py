"""megamor's model behind the interface of Hugging Face transformers.

Nothing in megamor imports this file: `export.py` copies it, with the modules that it needs, into every exported
directory, where `from_pretrained(..., trust_remote_code=True)` loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from megamor.config.routers import RouterConfig
from megamor.config.schema import Config, DataConfig, DepthStep, ModelConfig, RecursionConfig, RopeScalingConfig
from megamor.model import KVCache, Transformer
from megamor.model.loss import IGNORE


class MegamorConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """`megamor` holds the sections model, recursion, router and data of the run's configuration."""

    model_type = "megamor"


class DecodingCache:
    """A `KVCache` with the methods that `generate()` calls."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def get_seq_length(self, *_: Any) -> int:
        """Number of tokens in the cache."""
        return self.cache.num_tokens

    def reorder_cache(self, beams: Tensor) -> None:
        """Beam search: sequence i becomes a continuation of sequence `beams[i]`."""
        self.cache.select(beams)


class MegamorForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """`Transformer` under its router's inference rule, which is causal; this holds in training mode too."""

    config_class = MegamorConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    # Scores that nearly tie can change order when rounded to bf16, and then tokens take another depth.
    _keep_in_fp32_modules_strict = {"router"}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Transformer(settings(config.megamor))
        # from_pretrained builds on the meta device and fills in the stored weights; from_config expects initial ones.
        if not self.model.embed.weight.is_meta:
            self.model.init_weights()
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: Any) -> None:
        """Do nothing: `__init__` has initialised the weights."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # recursions hold different numbers of keys and values, so `DecodingCache` is used instead

    def get_input_embeddings(self) -> Any:
        return self.model.embed

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embed = value

    def get_output_embeddings(self) -> None:
        return None  # the embedding itself is the head; there is no second module to tie

    def prepare_inputs_for_generation(
        self, input_ids: Any, *_: Any, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        kept = {name: kwargs.get(name) for name in ("attention_mask", "use_cache")}
        return {"input_ids": input_ids[:, start:], "past_key_values": past_key_values, **kept}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Logits [B, S, vocabulary] of `input_ids` [B, S], and the loss if `labels` [B, S] are given.

        The loss compares position t with label t + 1; labels of -100 are ignored.

        Raises:
            ValueError: `attention_mask` masks a position, or the cache is too small.
        """
        if attention_mask is not None and bool((attention_mask == 0).any()):
            raise ValueError("padding isn't supported: use sequences of equal length, or one at a time")
        if use_cache and past_key_values is None:
            weight, config = self.model.embed.weight, self.model.config.model
            size = (input_ids.shape[0], config.max_seq_len)
            past_key_values = DecodingCache(KVCache(config, *size, weight.dtype, weight.device))
        cache = None if past_key_values is None else past_key_values.cache
        if cache is not None and cache.num_tokens + input_ids.shape[1] > cache.capacity:
            raise ValueError(
                f"the cache holds {cache.capacity} tokens (max_position_embeddings), and "
                f"{cache.num_tokens + input_ids.shape[1]} are needed: generate fewer, or pass use_cache=False"
            )
        logits = self.model(input_ids, mode="causal", cache=cache).logits
        loss = None
        if labels is not None:
            shifted = labels[:, 1:].to(logits.device).flatten()
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), shifted, ignore_index=IGNORE)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output


def settings(sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """The `Config` whose sections were exported. They were validated when the model was trained."""
    # JSON has no tuples, and the settings are hashable.
    values: dict[str, dict[str, Any]] = {
        section: {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        for section, fields in sections.items()
    }
    steps = tuple(DepthStep(**item) for item in values["recursion"].get("schedule_steps", ()))
    scaling = values["model"].get("rope_scaling")
    routers = {router.kind: router for router in get_args(RouterConfig) if hasattr(router, "kind")}
    return Config(
        model=ModelConfig(**{**values["model"], "rope_scaling": scaling and RopeScalingConfig(**scaling)}),
        recursion=RecursionConfig(**{**values["recursion"], "schedule_steps": steps}),
        router=routers[values["router"]["kind"]](**values["router"]),
        data=DataConfig(**values["data"]),
    )
