"""Exit rules for tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamor.config.exits import ExitName, ExitRule
from megamor.model import ModelOutput, Transformer
from megamor.routing import DepthBounds, TokenSet
from megamor.routing.confidence import ConfidenceSession
from tests.combinations import tokens


def median_rule(model: Transformer, name: ExitName) -> ExitRule:
    """A rule whose threshold is in the middle of what it will see, so that it stops some tokens and not others."""
    seen: list[Tensor] = []
    figure = ConfidenceSession.figure

    def watched(session: ConfidenceSession, states: Tensor, rows: TokenSet) -> Tensor:
        seen.append(figure(session, states, rows))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfidenceSession, "figure", watched)
        run(model, ExitRule(name, 1.0 if name == "max_probability" else 0.0))
    compared = torch.cat(seen[1:] if name in ("kl", "acceleration") else seen)
    half = len(compared) // 2
    # Between two figures, so that rounding decides about no token.
    return ExitRule(name, float(compared.sort().values[half - 1 : half + 1].mean()) if half else 1.0)


def run(model: Transformer, rule: ExitRule | None, bounds: DepthBounds | None = None) -> ModelOutput:
    """A causal pass under `rule`."""
    before = model.exit
    model.set_exit(rule)
    with torch.no_grad():
        out: ModelOutput = model(tokens(), mode="causal", bounds=bounds)
    model.set_exit(before)
    return out
