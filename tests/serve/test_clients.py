"""The server with clients of other projects: lm-eval's completions client, and malformed requests of schemathesis."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from transformers import PreTrainedTokenizerFast

from megamor.cli.serve import build_engine, parse_arguments
from megamor.codec import EndOfText, TextCodec
from megamor.evaluate.scoring import Scorer
from megamor.evaluate.tasks import load_tasks, run_tasks
from megamor.interop.export import export_huggingface
from megamor.load import load_model
from tests.combinations import ROUTERS
from tests.serve.fake import MODEL, FakeEngine, Running, byte_tokenizer, serving
from tests.tasks import CONTEXT, KINDS, task_model, task_tokenizer, write_tasks


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(FakeEngine(lambda prompt, index: f"ok{index}")) as running:
        yield running


@pytest.fixture(scope="module")
def openapi(server: Running) -> Any:
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "malformed"])
def test_no_request_breaks_the_server(mode: GenerationMode, openapi: Any, server: Running) -> None:
    """Answers to valid and invalid requests have a documented status and form; none crashes the server."""
    called: Counter[str] = Counter()
    for result in openapi.get_all_operations():
        operation = result.ok()
        if mode.is_negative and not len(operation.body):
            continue  # nothing about it can be wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def check(case: Any) -> None:
            called[case.operation.label] += 1
            response = case.call(timeout=20)
            case.validate_response(
                response, checks=[not_a_server_error, status_code_conformance, response_schema_conformance]
            )

        check()
    assert called["POST /v1/completions"] >= 50
    assert httpx.get(server.url + "/health").status_code == 200
    assert httpx.get(server.url + "/stats").json()["resident"] == 0


@pytest.fixture
def lm_eval_client(server: Running, tmp_path: Path) -> LocalCompletionsAPI:
    asyncio.set_event_loop(asyncio.new_event_loop())  # the client asks for the current one
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="!")
    tokenizer.save_pretrained(tmp_path)
    return LocalCompletionsAPI(
        base_url=server.url + "/v1/completions", model=MODEL, tokenizer=str(tmp_path), max_length=256, batch_size=2
    )


def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


def test_lm_eval_scores_continuations(lm_eval_client: LocalCompletionsAPI) -> None:
    requests = instances("loglikelihood", [("The sky is", " blue"), ("a", " b"), ("same", " length")])
    scores = lm_eval_client.loglikelihood(requests, disable_tqdm=True)
    assert [score for score, _ in scores] == [-0.5 * len(text) for text in (" blue", " b", " length")]
    assert all(is_greedy for _, is_greedy in scores)


def test_lm_eval_with_the_servers_tokenizer() -> None:
    """`tokenizer_backend=remote`: ids of texts and of the end of text, which is the context of a text without one."""
    codec = TextCodec(byte_tokenizer())
    codec.tokenizer.add_tokens(["<|endoftext|>"])
    codec = TextCodec(codec.tokenizer, end_of_text=EndOfText("<|endoftext|>", 256))
    asyncio.set_event_loop(asyncio.new_event_loop())
    with serving(FakeEngine(lambda *_: "ok", codec=codec)) as running:
        client = LocalCompletionsAPI(
            base_url=running.url + "/v1/completions", model=MODEL, tokenizer_backend="remote", max_length=256
        )
        assert client.eot_token_id == 256
        assert client.tokenizer.decode(client.tokenizer.encode("né")) == "né"
        scores = client.loglikelihood(instances("loglikelihood", [("", "abc")]), disable_tqdm=True)
        assert [score for score, _ in scores] == [-0.5 * 3]


def test_lm_eval_generates(lm_eval_client: LocalCompletionsAPI) -> None:
    requests = instances("generate_until", [("question", {"until": ["0"], "max_gen_toks": 10, "temperature": 0})])
    assert lm_eval_client.generate_until(requests, disable_tqdm=True) == ["ok"]


@pytest.mark.parametrize("router", ["expert_choice", pytest.param("act_hard", marks=pytest.mark.slow)])
def test_tasks_through_the_server_equal_those_in_process(router: str, tmp_path: Path) -> None:
    """The harness's client of this server finds the log-likelihoods that `megamor evaluate --tasks` finds."""
    tokenizer, export = tmp_path / "tokenizer.json", tmp_path / "export"
    task_tokenizer().save(str(tokenizer))
    export_huggingface(task_model(ROUTERS[router], torch.float32), export, tokenizer=tokenizer)
    loaded = load_model(export, "cpu")
    # The first documents fit into the context: of longer ones the client keeps a token less.
    tasks = load_tasks([*KINDS], directory=write_tasks(tmp_path / "tasks"), limit=2, quiet=True)
    run_tasks(Scorer.of(loaded), loaded.codec(), tasks)
    engine: Any = build_engine(parse_arguments(["--checkpoint", str(export)]), loaded)
    engine.codec, engine.gate = loaded.codec(), threading.Event()
    with serving(engine) as running:
        asyncio.set_event_loop(asyncio.new_event_loop())
        client = LocalCompletionsAPI(
            base_url=running.url + "/v1/completions", model=MODEL, tokenizer=str(export), max_length=CONTEXT - 1
        )
        for task in tasks.loaded["tasks"].values():
            requests = list(task.instances)
            answers = getattr(client, requests[0].request_type)(requests, disable_tqdm=True)
            for request, theirs in zip(requests, answers, strict=True):
                ours = request.resps[0]
                if isinstance(ours, tuple):
                    assert ours[1] == theirs[1]
                    ours, theirs = ours[0], theirs[0]
                assert ours == (theirs if isinstance(ours, str) else pytest.approx(theirs, abs=2e-5)), task
