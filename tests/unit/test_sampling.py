"""Generation: greedy tokens equal those of full passes, sampling follows the distribution, the context is limited."""

from __future__ import annotations

import pytest
import torch

from megamor.cli.generate import parse_arguments
from megamor.errors import CheckpointError, ConfigError
from megamor.evaluate.sampling import generate, sample
from tests.combinations import ROUTERS, SEQ_LEN, lively_model, tiny_config, vanilla_config


@pytest.mark.parametrize("router", [*ROUTERS, "vanilla"])
def test_greedy_generation_equals_full_passes(router: str) -> None:
    model = lively_model(vanilla_config() if router == "vanilla" else tiny_config(ROUTERS[router]))
    found = generate(model, [3, 1, 4], 12, temperature=0)
    ids, depths = [3, 1, 4], []
    with torch.no_grad():
        for _ in range(12):
            out = model(torch.tensor([ids]), mode="causal")
            ids.append(int(out.logits[0, -1].argmax()))
    depths = [0] * 14 if out.depth is None else out.depth[0].tolist()
    assert (found.ids, found.depths, found.prompt_length) == (ids, depths, 3)


def test_generation_ends_at_the_stop_token() -> None:
    model = lively_model(tiny_config(ROUTERS["expert_choice"]))
    free = generate(model, [5], 10, temperature=0)
    stopped = generate(model, [5], 10, temperature=0, stop_id=free.ids[3])
    assert stopped.ids == free.ids[: free.ids.index(free.ids[3], 1) + 1]


def test_same_seed_same_text() -> None:
    model = lively_model(tiny_config(ROUTERS["expert_choice"]))
    texts = [generate(model, [5], 15, temperature=3.0, seed=seed).ids for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_too_long_for_the_context() -> None:
    model = lively_model(tiny_config(ROUTERS["fixed"]))
    assert len(generate(model, [1, 2], SEQ_LEN - 1, temperature=0).ids) == SEQ_LEN + 1
    with pytest.raises(ConfigError, match=f"context of {SEQ_LEN}"):
        generate(model, [1, 2], SEQ_LEN)


def test_nucleus_sampling_follows_the_truncated_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([sample(logits, 1.0, 0.75, generator) for _ in range(4000)]), minlength=4)
    torch.testing.assert_close(counts / 4000, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03, rtol=0)


def test_a_model_of_nan_says_so_instead_of_taking_a_token() -> None:
    model = lively_model(tiny_config(ROUTERS["fixed"]))
    model.embed.weight.data.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(CheckpointError, match="NaN"):
            generate(model, [1], 2, temperature=temperature)


@pytest.mark.parametrize("option", [("--temperature", "nan"), ("--temperature", "inf"), ("--seed", str(2**64))])
def test_numbers_that_sampling_cannot_use(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(["--checkpoint", "x", "--prompt", "a", *option])
    assert f"{option[0]} must" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "options"),
    [([], {}), ([-1], {}), ([10**6], {}), ([1], {"temperature": -1.0}), ([1], {"top_p": 0.0}), ([1], {"top_p": 2.0})],
)
def test_values_out_of_range_are_refused(prompt: list[int], options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"prompt needs|give at least 0"):
        generate(lively_model(tiny_config(ROUTERS["token_choice"])), prompt, 2, **options)


def test_ids_of_a_tensor_become_integers() -> None:
    model = lively_model(tiny_config(ROUTERS["token_choice"]))
    found = generate(model, torch.tensor([3, 1]), 1)  # type: ignore[arg-type]
    assert all(type(token) is int for token in found.ids)
