"""A trained checkpoint, served in fp32: directly, and after export to Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megamor.cli import evaluate, export_hf, generate
from megamor.cli import serve as serve_command
from megamor.cli.serve import build_engine, parse_arguments
from megamor.evaluate.sampling import generate as continue_text
from megamor.load import load_model
from megamor.serve.engine.engine import ServingEngine
from megamor.serve.engine.request import SamplingParams
from megamor.serve.options import POLICIES
from tests.exits import median_rule
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


def test_commands_obey_an_exit_rule(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine that `megamor serve` makes, `generate` and `evaluate` stop the same tokens."""
    loaded = load_model(checkpoint, "cpu")
    prompt = loaded.tokenizer().encode(TEXT[:40]).ids
    free = continue_text(loaded.model, prompt, 12, temperature=0)
    rule = median_rule(loaded.model, "entropy")
    option = ["--exit", rule.name, "--exit-threshold", repr(rule.threshold)]
    loaded.model.set_exit(rule)
    expected = continue_text(loaded.model, prompt, 12, temperature=0)
    assert 0 < sum(expected.depths) < sum(free.depths)

    engines: list[ServingEngine] = []
    monkeypatch.setattr(
        "megamor.serve.http.server.serve", lambda app, *_: engines.append(app.state.server.runner._engine)
    )
    serve_command.main(["--checkpoint", str(checkpoint), "--device", "cpu", "--port", "0", *option])
    assert f"with exit {rule}" in capsys.readouterr().err
    engines[0].add_request(prompt, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    outputs = [output for _ in iter(lambda: engines[0].has_work, False) for output in engines[0].step()]
    assert [token for output in outputs for token in output.tokens] == expected.ids[len(prompt) :]
    assert [depth for output in outputs for depth in output.depths] == expected.depths[len(prompt) - 1 :]

    text = ["--prompt", TEXT[:40], "--max-tokens", "12", "--temperature", "0", "--device", "cpu"]
    generate.main(["--checkpoint", str(checkpoint), *text, *option])
    assert capsys.readouterr().out.startswith(TEXT[:40] + loaded.tokenizer().decode(expected.ids[len(prompt) :])[:4])

    prefix, figures = loaded.config.data.train[0].prefix, []
    for options in ([], option):
        arguments = ["--checkpoint", str(checkpoint), "--data", prefix, "--json", str(tmp_path / "figures.json")]
        evaluate.main([*arguments, "--device", "cpu", *options])
        figures += json.loads((tmp_path / "figures.json").read_text())["sets"].values()
    assert f"causal with exit {rule}" in " ".join(capsys.readouterr().out.split())
    without, under = figures
    assert under.pop("exit_entropy") == rule.threshold
    assert without.keys() == under.keys()
    assert under["loss_topk"] == without["loss_topk"]
    assert under["mean_depth_causal"] < without["mean_depth_causal"]


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (["--exit", "kl"], "give both, or neither"),
        (["--exit-threshold", "1"], "give both, or neither"),
        (["--exit", "max_probability", "--exit-threshold", "90"], "max_probability needs a number from 0 to 1"),
    ],
)
def test_an_exit_rule_that_is_none_ends_the_command(
    option: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, arguments in (
        (generate.main, ["--prompt", "a"]),
        (evaluate.main, ["--data", "x"]),
        (serve_command.main, []),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["--checkpoint", "nowhere", *arguments, *option])
        assert ended.value.code == 2
        assert told in capsys.readouterr().err
