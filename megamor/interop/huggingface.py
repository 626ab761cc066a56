"""megamor's model behind the interface of Hugging Face transformers: the one file that imports it.

The classes are made inside functions, so that nobody needs transformers who doesn't use it. An exported model carries
this file in its code, with the functions' bodies at the top level (see `export.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor
from torch.nn import functional as F

from megamor.config import Config, DataConfig, ModelConfig, RecursionConfig, RouterConfig
from megamor.errors import ConfigError
from megamor.model import KVCache, Transformer
from megamor.model.loss import IGNORE


def import_transformers() -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError("this needs transformers: pip install 'megamor[hf]'") from None
    return transformers


def exported_config(sections: Mapping[str, Any]) -> Config:
    """The configuration in the `config.json` of an export.

    Its values are used as `config_to_dict` wrote them, so that an exported model needs no pydantic.
    """
    kind = sections["router"]["kind"]
    (router,) = (member for member in get_args(RouterConfig) if member.kind == kind)
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in sections["router"].items()}
    return Config(
        model=ModelConfig(**sections["model"]),
        recursion=RecursionConfig(**sections["recursion"]),
        router=router(**settings),
        data=DataConfig(**sections["data"]),
    )


class DecodingCache:
    """A `KVCache` that `generate()` carries from token to token."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def get_seq_length(self, *_: Any) -> int:
        """Tokens read so far."""
        return self.cache.num_tokens

    def reorder_cache(self, beams: Tensor) -> None:
        """Let sequence i go on as `beams[i]` did (beam search)."""
        for store in self.cache.stores.values():
            for name in ("k", "v", "order", "lengths"):
                setattr(store, name, getattr(store, name).index_select(0, beams))


def configuration_class() -> Any:
    """`MegamorConfig`."""
    from transformers import PretrainedConfig

    class MegamorConfig(PretrainedConfig):
        """`megamor` holds the sections model, recursion and router of the run's configuration."""

        model_type = "megamor"

    return MegamorConfig


def model_class(MegamorConfig: Any) -> Any:
    """`MegamorForCausalLM`."""
    from transformers import GenerationMixin, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class MegamorForCausalLM(PreTrainedModel, GenerationMixin):
        """`Transformer` under its router's inference rule, which never looks ahead, also when it is trained on."""

        config_class = MegamorConfig
        base_model_prefix = "model"
        main_input_name = "input_ids"
        _supports_sdpa = True
        _keep_in_fp32_modules_strict = {"router"}  # noqa: RUF012 - near ties of scores flip in bf16

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = Transformer(exported_config(config.megamor))
            if not self.model.embed.weight.is_meta:
                self.model.init_weights()
            self.post_init()

        def _init_weights(self, module: Any) -> None:
            """Nothing: the model has initialised itself."""

        @classmethod
        def _supports_default_dynamic_cache(cls) -> bool:
            return False  # keys and values differ in number between recursions: `DecodingCache`

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
            inputs = {"input_ids": input_ids[:, start:], "past_key_values": past_key_values}
            for name in ("attention_mask", "use_cache"):
                inputs[name] = kwargs.get(name)
            return inputs

        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            labels: Tensor | None = None,
            past_key_values: Any = None,
            use_cache: bool | None = None,
            return_dict: bool | None = None,
        ) -> Any:
            """input_ids and labels [B, S]; the loss compares position t with label t + 1, -100 doesn't count."""
            if attention_mask is not None and bool((attention_mask == 0).any()):
                raise ValueError("padding isn't supported: give sequences of one length, or one at a time")
            if use_cache and past_key_values is None:
                past_key_values = DecodingCache(self.new_cache(input_ids))
            cache = None if past_key_values is None else past_key_values.cache
            if cache is not None and cache.num_tokens + input_ids.shape[1] > cache.capacity:
                raise ValueError(
                    f"the cache holds {cache.capacity} tokens (max_position_embeddings), more were asked for"
                )
            logits = self.model(input_ids, mode="causal", cache=cache).logits
            loss = None
            if labels is not None:
                shifted = labels[:, 1:].to(logits.device).flatten()
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), shifted, ignore_index=IGNORE)
            output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
            return output.to_tuple() if return_dict is False else output

        def new_cache(self, input_ids: Tensor) -> KVCache:
            """An empty cache for as many sequences as `input_ids` has."""
            weight = self.model.embed.weight
            config = self.model.config.model
            return KVCache(config, input_ids.shape[0], config.max_seq_len, weight.dtype, weight.device)

    return MegamorForCausalLM
