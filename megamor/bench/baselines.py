"""Other people's implementations of the dense model, to compare ours with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from megamor.config import Config
from megamor.errors import ConfigError
from megamor.interop.export import model_shape
from megamor.model import ModelOutput
from megamor.model.loss import IGNORE


class HuggingFaceLlama(nn.Module):
    """LlamaForCausalLM of the same shape as the dense model of a configuration, behind the interface of `Transformer`.

    Raises:
        ConfigError: transformers is not installed.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__()
        try:
            import transformers
        except ImportError:
            raise ConfigError("this needs transformers: pip install 'megamor[hf]'") from None
        torch.manual_seed(config.run.seed)
        settings: dict[str, Any] = {"rms_norm_eps": config.model.norm_eps, "rope_theta": config.model.rope_theta}
        settings |= {"tie_word_embeddings": config.model.tied_head, "attention_bias": False, "mlp_bias": False}
        settings |= {**model_shape(config), "attn_implementation": "sdpa", "use_cache": False}
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
        self.model = model.to(device)

    def forward(self, inputs: Tensor, labels: Tensor, **_: object) -> ModelOutput:
        """inputs [B, S], labels [B, S] of the next tokens. Mode and step make no difference here."""
        num_tokens = (labels != IGNORE).sum()
        # `shift_labels`: ours are shifted already. It averages over all positions, which are all valid in a bench.
        loss = self.model(input_ids=inputs, labels=labels, shift_labels=labels).loss
        return ModelOutput(None, loss * num_tokens, num_tokens, {}, {}, {}, None, None)

    def set_activation_checkpointing(self, mode: str, _: object) -> None:
        """Refuse any mode but `none`.

        Raises:
            ConfigError: another mode.
        """
        if mode != "none":
            raise ConfigError(f"train.activation_checkpointing {mode}: a baseline has only none; leave --baseline out")

    def parallel_plan(self) -> SimpleNamespace:
        """One unit, whose layers may be compiled each on its own."""
        return SimpleNamespace(units=(), stages=(), routers=(), compile_targets=tuple(self.model.model.layers))
