"""A trained checkpoint, served in fp32: directly, and after export to Hugging Face."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megamor.cli import export_hf
from megamor.cli.serve import build_engine, parse_arguments
from megamor.load import load_model
from megamor.serve.engine.request import SamplingParams
from megamor.serve.options import POLICIES
from tests.serve.process import TEXT, trained_checkpoint
from tests.serve.reference import Answer, answer

PARAMS = SamplingParams(max_tokens=12, temperature=0.8, seed=3, n=2)
PROMPTS = (TEXT[:9], TEXT[:40], "lazy", "quick brown")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return trained_checkpoint(tmp_path_factory.mktemp("model"), steps=60)


@pytest.fixture(scope="module")
def export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "hf"
    export_hf.main(["--checkpoint", str(checkpoint), "--output", str(output)])
    return output


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[Answer]:
    """The reference's answers, in fp32 too."""
    loaded = load_model(checkpoint, "cpu")
    ids = [loaded.tokenizer().encode(prompt).ids for prompt in PROMPTS]
    found = [answer(loaded.model, prompt, PARAMS, index, None) for prompt in ids for index in range(PARAMS.n)]
    assert len({depth for one in found for depth in one.depths}) > 1, "otherwise comparing depths proves nothing"
    return found


@pytest.mark.promise("R15")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("source", ["checkpoint", "export"])
def test_a_trained_model_answers_as_the_full_forward_pass(
    source: str, policy: str, expected: list[Answer], request: pytest.FixtureRequest
) -> None:
    arguments = parse_arguments(["--checkpoint", str(request.getfixturevalue(source)), "--policy", policy])
    loaded = load_model(arguments.checkpoint, "cpu")
    engine = build_engine(arguments, loaded)
    numbers = [engine.add_request(loaded.tokenizer().encode(prompt).ids, PARAMS) for prompt in PROMPTS]
    found: dict[tuple[int, int], tuple[list[int], list[int]]] = {
        (number, index): ([], []) for number in numbers for index in range(PARAMS.n)
    }
    while engine.has_work:
        for output in engine.step():
            tokens, depths = found[output.request, output.index]
            tokens += output.tokens
            depths += output.depths
    assert [tuple(tokens) for tokens, _ in found.values()] == [want.tokens for want in expected]
    assert [tuple(depths) for _, depths in found.values()] == [want.depths for want in expected]
