"""What is wrong with one request ends this request and no other: processors that fail, logits that aren't numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from megamor.model import Transformer
from megamor.serve.engine.cpu_kernels import Kernels, compiled
from megamor.serve.engine.engine import NUMERIC_ERROR, ServingEngine
from megamor.serve.engine.request import RequestOutput, SamplingParams
from megamor.serve.engine.sampler import NO_TOKEN, Draw, sample
from megamor.serve.options import POLICIES, EngineOptions, Policy
from tests.combinations import ROUTERS, lively_model, tiny_config
from tests.serve.reference import answer
from tests.serve.test_api import real_engine
from tests.serve.test_equality import SERVED, call_again
from tests.serve.test_server import error_of, post, serving

PROMPT = (5, 6, 7, 8, 9)
PARAMS = SamplingParams(max_tokens=6, temperature=0.8, seed=3, n=2)


def fails(message: str) -> Callable[..., Tensor]:
    def process(tokens: Any, logits: Tensor) -> Tensor:
        logits[0] = 3.0
        if len(tokens) > len(PROMPT) + 1:
            raise ValueError(message)
        return logits

    return process


BROKEN: dict[str, Callable[..., Any]] = {
    "raises": fails("on purpose"),
    "returns nothing": lambda tokens, logits: None,
    "returns another size": lambda tokens, logits: logits[:-1],
    "returns NaN": lambda tokens, logits: logits.index_fill(0, torch.tensor([4]), math.nan),
    "leaves no token": lambda tokens, logits: logits.fill_(-math.inf),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_processor_ends_only_its_own_request(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = lively_model(tiny_config(ROUTERS["expert_choice"])).eval()
    engine = ServingEngine(model, EngineOptions(kv_memory=1 << 22, page_size=4))
    good = [engine.add_request(PROMPT, PARAMS) for _ in range(2)]
    bad = PARAMS.model_copy(update={"logits_processor": BROKEN[name], "logprobs": 2})
    bad_number = engine.add_request(PROMPT, bad)
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step()
    wrong = [output for output in outputs if output.request == bad_number]
    assert [output.error for output in wrong if output.error] == [NUMERIC_ERROR]
    assert wrong[-1].error, "nothing follows"
    assert (wrong[-1].tokens, wrong[-1].finish_reason) == ((), None)
    assert any("logits_processor" in record.message for record in caplog.records) == name.startswith(("rai", "ret")) & (
        name != "returns NaN"
    )
    for number in good:
        for index in range(2):
            found = [t for o in outputs if (o.request, o.index) == (number, index) for t in o.tokens]
            assert tuple(found) == answer(model, PROMPT, PARAMS, index, None).tokens
    assert not engine.requests
    assert len(engine.scheduler.free_slots) == engine.options.num_slots


def test_rows_without_a_token() -> None:
    logits = torch.zeros(5, 9, dtype=torch.float64)
    logits[1, 7], logits[2], logits[3, 2] = math.nan, -math.inf, math.inf
    for settings in ({"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}):
        params = SamplingParams(seed=1, **settings)
        found = sample(logits, [Draw(params, 1, 0, [1, 2], 1, banned=(4,))] * 5).tolist()
        assert found[1:4] == [NO_TOKEN, NO_TOKEN, 2], settings
        assert found[0] == found[4] != NO_TOKEN


@pytest.mark.parametrize(
    "body", [{}, {"temperature": 0, "n": 2}, {"echo": True, "logprobs": 1, "max_tokens": 0}], ids=str
)
def test_logits_that_are_no_numbers_are_an_error(body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN logits end their own request only; a stream is told in an event, and the server keeps running."""
    engine: Any = real_engine(page_size=4)
    readout = engine.model.readout
    with serving(engine) as server:
        wanted = post(server, prompt=list(PROMPT), seed=1).json()["choices"]
        monkeypatch.setattr(engine.model, "readout", lambda x: readout(x).index_fill_(1, torch.tensor([3]), math.nan))
        error = error_of(post(server, prompt=list(PROMPT), **body), 500)
        assert (error["type"], error["message"]) == ("server_error", NUMERIC_ERROR)
        streamed = httpx.post(
            server.url + "/v1/completions", json={"prompt": list(PROMPT), "stream": True, **body}, timeout=20
        )
        assert streamed.status_code == 500, "nothing was sent yet"
        monkeypatch.setattr(engine.model, "readout", readout)
        assert post(server, prompt=list(PROMPT), seed=1).json()["choices"] == wanted
        assert httpx.get(server.url + "/health").status_code == 200
        assert json.loads(httpx.get(server.url + "/stats").text)["resident"] == 0


# A token whose keys and values are NaN, in the model and its pages

NAN_TOKEN = 50
TEXT = (7, 3, 9, 1, 4, 8, 2, 6, 5, 12, 14, 13, 11, 19, 17, 15, 16, 18, 21, 20)


def model_with_nan(kv_policy: str, kernels: bool, **changes: Any) -> Transformer:
    config = tiny_config(ROUTERS["expert_choice"], kv_policy)
    changes |= {"head_width": 16} if kernels else {}
    config = replace(config, model=replace(config.model, tied_head=False, max_seq_len=64, **changes))
    model = lively_model(config, dtype=torch.float32 if kernels else torch.float64).eval()
    with torch.no_grad():
        model.embed.weight[NAN_TOKEN] = math.nan
    return model


def answers(engine: ServingEngine, prompts: Iterable[tuple[int, ...]]) -> list[tuple[list[int], list[float]] | None]:
    """Tokens and log-probabilities for prompts that come at the same time, None for an error."""
    params = SamplingParams(max_tokens=3, temperature=0, logprobs=0, ignore_eos=True)
    found: dict[int, Any] = {engine.add_request(prompt, params): ([], []) for prompt in prompts}
    while engine.has_work:
        for output in engine.step():
            if output.error:
                assert output.error == NUMERIC_ERROR
                found[output.request] = None
                continue
            found[output.request][0].extend(output.tokens)
            found[output.request][1].extend(entry.logprob for entry in output.logprobs or ())
    return list(found.values())


def compare(found: Any, wanted: Any, exact: float) -> None:
    for (tokens, logprobs), (want, want_logprobs) in zip(found, wanted, strict=True):
        assert tokens == want
        assert logprobs == pytest.approx(want_logprobs, abs=exact)


def nan_cases() -> list[Any]:
    need = pytest.mark.skipif(isinstance(compiled(), str), reason="kernels of the CPU")
    return [pytest.param(True, id="kernels", marks=need), pytest.param(False, id="torch")]


@pytest.mark.parametrize("kernels", nan_cases())
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kv_policy", SERVED)
def test_nan_stays_in_its_own_text(kv_policy: str, policy: Policy, kernels: bool) -> None:
    """Not in pages that are used again, not in those of others at the same time, not in cached prefixes."""
    model = model_with_nan(kv_policy, kernels)
    exact = 1e-4 if kernels else 1e-9
    options = EngineOptions(
        policy,
        page_size=16 if kernels else 4,
        chunk_size=16 if kernels else 5,
        num_pages={"edge": 24, "core": 60},
        max_resident=4,
    )

    def made() -> ServingEngine:
        engine = ServingEngine(model, options)
        assert isinstance(engine.kernels, Kernels) == kernels
        if (POLICIES.index(policy) + SERVED.index(kv_policy)) % 2:
            engine.record_graphs(call_again)
        return engine

    # Whatever pages hold before they are used.
    engine = made()
    for pages in (pages for pool in engine.runner.cache.pages.values() for layer in pool for pages in layer):
        pages.fill_(math.nan)
    long = 2 * TEXT
    good = [long[:length] for length in (1, 2, 7, 17, 21, 33)]
    wanted = [answers(made(), [prompt])[0] for prompt in good]
    assert None not in wanted
    compare(answers(engine, good), wanted, exact)
    engine = made()
    # The NaN is in a later chunk, in the first one, in the last row.
    bad = [(*long[:at], NAN_TOKEN, *long[at:38]) for at in (25, 3, 38)] + [(NAN_TOKEN,)]
    for number in range(3):
        # Alone, and then together, in which they begin like one another.
        assert answers(engine, [bad[number]]) == [None]
        found = [answers(engine, [prompt])[0] for prompt in good]
        mixed = answers(engine, [bad[number], *good[:3], bad[3], bad[0], *good[3:]])
        assert [mixed[place] for place in (0, 4, 5)] == [None] * 3
        compare(found, wanted, exact)
        compare([mixed[place] for place in (1, 2, 3, 6, 7, 8)], wanted, exact)
    kept = [block.key[1] for block in engine.scheduler.prefixes.blocks.values()]
    assert kept
    assert not any(NAN_TOKEN in tokens for tokens in kept)
