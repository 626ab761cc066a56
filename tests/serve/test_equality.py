"""The engine gives the same tokens and depths as the naive reference, in fp64, for every schedule.

Requests of every kind (greedy, sampled, several continuations, bounded depth, penalties, stop tokens, shared prefixes,
log-probabilities) arrive in different orders, some are aborted, and memory is too small for all of them. The default
suite covers every router with every KV policy and cycles through the other choices; the full product is slow.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import pytest
import torch
from torch import Tensor

from megamor.config import RecursionConfig
from megamor.config.exits import EXITS, ExitName
from megamor.errors import ConfigError
from megamor.model import Transformer, build_model
from megamor.routing import RoutingSession, TokenSet
from megamor.routing.expert_choice import ExpertChoiceSession
from megamor.serve.engine.engine import ServingEngine
from megamor.serve.engine.flight import SequenceState
from megamor.serve.engine.request import RequestError, RequestOutput, SamplingParams
from megamor.serve.options import POLICIES, EngineOptions
from tests.combinations import ROUTERS, SERVED_ROUTERS, SHARINGS, lively_model, tiny_config, tokens, vanilla_config
from tests.exits import median_rule
from tests.serve.reference import Answer, answer, replayed_logprobs
from tests.serve.test_scheduler import add_noise

END, AMPLE = 11, 1 << 22
SERVED = ("recursion_wise", "share_first")
PAGE_SIZES, CHUNK_SIZES = (1, 3, 16), (1, 4, 64)
TEXT = tuple(tokens(seed=4, batch=1, length=20)[0].tolist())
REQUESTS: tuple[tuple[tuple[int, ...], SamplingParams], ...] = (
    (TEXT[:9], SamplingParams(max_tokens=7, temperature=0, logprobs=3)),
    (TEXT[:13], SamplingParams(max_tokens=6, temperature=0.9, top_k=20, top_p=0.9, seed=5, n=2)),
    (TEXT[:7], SamplingParams(max_tokens=5, temperature=0, max_depth=2, prompt_logprobs=2, logprobs=0)),
    (
        (3, *TEXT[:2]),
        SamplingParams(max_tokens=8, temperature=1.3, min_p=0.02, seed=-3, stop_token_ids=(1, 2, 3, 4, 5)),
    ),
    (TEXT[:13], SamplingParams(max_tokens=4, temperature=0, max_depth=1, allowed_token_ids=tuple(range(90)))),
    (
        TEXT[:12],
        SamplingParams(
            max_tokens=6,
            min_tokens=2,
            temperature=0.7,
            seed=9,
            repetition_penalty=1.4,
            presence_penalty=0.5,
            frequency_penalty=0.3,
            stop_token_ids=tuple(range(20, 60)),
        ),
    ),
    (TEXT[:6], SamplingParams(max_tokens=0, prompt_logprobs=0)),
)
ORDERS = ((0, 1, 2, 3, 4, 5, 6), (6, 5, 4, 3, 2, 1, 0), (3, 0, 4, 1, 5, 2, 6))


@dataclass(frozen=True)
class Schedule:
    """How the requests are served: `gap` steps between arrivals; request `given_up` is aborted while it runs.

    `recorded` runs batches through the buffers of CUDA graphs; without a GPU the functions are called again instead of
    replayed. `late` reads tokens as on a GPU, when the next batches are queued already.
    """

    policy: str
    page_size: int
    chunk_size: int
    order: int = 0
    gap: int = 1
    given_up: int | None = None
    small: bool = True
    hold: int = 1
    recorded: bool = False
    late: bool = False


@lru_cache(maxsize=4)
def model_of(router: str, kv_policy: str, sharing: str) -> Transformer:
    return lively_model(tiny_config(ROUTERS[router], kv_policy, sharing)).eval()


def expected(model: Transformer) -> dict[tuple[int, int], Answer]:
    """The reference's answers by request and continuation."""
    return {
        (number, index): answer(model, prompt, params, index, END)
        for number, (prompt, params) in enumerate(REQUESTS)
        for index in range(params.n)
    }


def small_pools(model: Transformer, page_size: int) -> dict[str, int]:
    """Slightly more pages than the longest request needs alone."""
    book = ServingEngine(model, EngineOptions(page_size=page_size, kv_memory=AMPLE)).scheduler.book
    longest = book.worst_case(19, 3)
    return {pool: count + 3 for pool, count in longest.items()}


def call_again(run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], object]]:
    """Replaces `cuda_recorder`: the function is called again, and its results go where they went before."""
    kept = tuple(result.clone() for result in run())
    return kept, lambda: [old.copy_(new) for old, new in zip(kept, run(), strict=True)]


def serve(model: Transformer, schedule: Schedule) -> tuple[dict[tuple[int, int], list[RequestOutput]], ServingEngine]:
    """The answers by request and continuation."""
    engine = ServingEngine(
        model,
        EngineOptions(
            policy=schedule.policy,  # type: ignore[arg-type]
            page_size=schedule.page_size,
            chunk_size=schedule.chunk_size,
            hold=schedule.hold,
            max_resident=4,
            kv_memory=AMPLE,
            num_pages=small_pools(model, schedule.page_size) if schedule.small else None,
            end_token=END,
            read_late=schedule.late,
        ),
    )
    if schedule.recorded:
        engine.record_graphs(call_again)
    arriving, names = list(ORDERS[schedule.order]), dict[int, int]()
    outputs: dict[tuple[int, int], list[RequestOutput]] = {
        (number, index): [] for number, (_, params) in enumerate(REQUESTS) for index in range(params.n)
    }
    step = 0
    while arriving or engine.has_work:
        if arriving and step % schedule.gap == 0:
            number = arriving.pop(0)
            names[engine.add_request(*REQUESTS[number])] = number
        for output in engine.step():
            outputs[names[output.request], output.index].append(output)
        if schedule.given_up in names.values() and step == 3 * schedule.gap + 4:
            engine.abort(next(name for name, number in names.items() if number == schedule.given_up))
        step += 1
    return outputs, engine


def check(model: Transformer, schedule: Schedule, wanted: dict[tuple[int, int], Answer]) -> ServingEngine:
    """Serve the requests and compare with the reference; all pages must be free at the end."""
    outputs, engine = serve(model, schedule)
    for key, parts in outputs.items():
        want, params = wanted[key], REQUESTS[key[0]][1]
        got = Answer(
            tuple(token for part in parts for token in part.tokens),
            tuple(depth for part in parts for depth in part.depths),
            (),
            (),
        )
        if key[0] == schedule.given_up:
            assert got.tokens == want.tokens[: len(got.tokens)], (schedule, key)
            continue
        assert (got.tokens, got.depths) == (want.tokens, want.depths), (schedule, key)
        ended = bool(want.tokens) and (want.tokens[-1] == END or want.tokens[-1] in params.stop_token_ids)
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["stop" if ended else "length"]
        check_logprobs(parts, params, want)
    assert all(len(pool) == 0 for pool in held_pages(engine)), "pages of finished requests are still held"
    while engine.scheduler.prefixes.drop_oldest():
        pass
    free = {name: len(pool.free) for name, pool in engine.scheduler.book.pools.items()}
    assert free == engine.scheduler.book.num_pages
    assert len(engine.scheduler.free_slots) == engine.options.num_slots
    assert not engine.requests
    return engine


def check_logprobs(parts: Sequence[RequestOutput], params: SamplingParams, want: Answer) -> None:
    if params.logprobs is not None:
        found = [logprob for part in parts for logprob in part.logprobs or ()]
        assert [one.logprob for one in found] == pytest.approx(want.logprobs, abs=1e-9)
        assert all(len(one.top) == params.logprobs for one in found)
    if params.prompt_logprobs is not None:
        assert parts[0].prompt_logprobs is not None
        first, *others = parts[0].prompt_logprobs
        assert first is None
        assert [one.logprob for one in others if one is not None] == pytest.approx(want.prompt_logprobs, abs=1e-9)


def held_pages(engine: ServingEngine) -> list[list[int]]:
    return [table.pages for sequence in engine.scheduler.residents for table in sequence.tables]


def schedules_for(number: int) -> list[Schedule]:
    """One schedule for each policy; cycle through the other choices."""
    return [
        Schedule(
            policy,
            PAGE_SIZES[(number + place) % 3],
            CHUNK_SIZES[(number // 3 + place) % 3],
            order=(number + 2 * place) % 3,
            gap=1 + 4 * ((number // 2 + place) % 2),
            given_up=(None, 1, 5, 0)[(number + place) % 4],
            small=(number + place) % 3 > 0,
            hold=1 + (number + place) % 2,
            recorded=(number // 2 + place) % 2 == 0,
            late=(number // 4 + place // 2) % 2 == 0,
        )
        for place, policy in enumerate(POLICIES)
    ]


@pytest.mark.promise("R15")
@pytest.mark.parametrize("kv_policy", SERVED)
@pytest.mark.parametrize("router", SERVED_ROUTERS)
def test_every_router_and_kv_policy(router: str, kv_policy: str) -> None:
    number = list(ROUTERS).index(router) + len(ROUTERS) * SERVED.index(kv_policy)
    model = model_of(router, kv_policy, SHARINGS[number % len(SHARINGS)])
    wanted = expected(model)
    for schedule in schedules_for(number):
        check(model, schedule, wanted)


@pytest.mark.slow
@pytest.mark.promise("R15")
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("kv_policy", SERVED)
@pytest.mark.parametrize("router", SERVED_ROUTERS)
def test_the_whole_product(router: str, kv_policy: str, sharing: str) -> None:
    model = model_of(router, kv_policy, sharing)
    wanted = expected(model)
    choices = product(POLICIES, PAGE_SIZES, CHUNK_SIZES, range(len(ORDERS)))
    for number, (policy, page_size, chunk_size, order) in enumerate(choices):
        given_up = (None, 1, 5, 0)[number % 4]
        schedule = Schedule(
            policy,
            page_size,
            chunk_size,
            order,
            1 + number % 5,
            given_up,
            number % 3 > 0,
            1 + number % 3,
            number % 2 == 0,
            number % 5 < 3,
        )
        check(model, schedule, wanted)


# The greatest depth that a router can be made to take: one that halts softly can't be held back from halting.
FORCED = {"fixed_2_of_3": 2, "act_soft": 1, "pondernet": 1}


@pytest.mark.promise("R15")
@pytest.mark.parametrize("kv_policy", SERVED)
@pytest.mark.parametrize("router", SERVED_ROUTERS)
def test_near_ties_poison_no_prefix(router: str, kv_policy: str) -> None:
    """Sequences that share a prefix take different depths while they fill the prefix cache.

    Each must have been computed with the depths that it has recorded, and with those of no other sequence: its
    log-probabilities are those of one full forward pass with these depths. Several continuations, requests that need
    all log-probabilities of the prompt, aborts, preemption and prefixes that end inside a page are among them.
    """
    number = list(ROUTERS).index(router) + SERVED.index(kv_policy)
    model = model_of(router, kv_policy, SHARINGS[number % len(SHARINGS)])
    options = EngineOptions(
        POLICIES[number % 3],
        hold=1 + number % 2,
        page_size=3,
        chunk_size=(2, 4, 64)[number % 3],
        max_resident=5,
        num_pages={pool: 2 * count for pool, count in small_pools(model, 3).items()},
    )
    engine, draw = ServingEngine(model, options), torch.Generator().manual_seed(number)
    greedy = SamplingParams(max_tokens=4, temperature=0, logprobs=0)
    outputs = dict[SequenceState, list[RequestOutput]]()
    names = dict[tuple[int, int], SequenceState]()
    together: tuple[tuple[int, dict[str, int]], ...]
    together = ((13, {}), (13, {"n": 2}), (10, {}), (14, {"prompt_logprobs": 0}), (13, {"n": 2}), (15, {}))
    for step, (length, changes) in enumerate((*together, (13, {}))):
        name = engine.add_request(TEXT[:length], greedy.model_copy(update=changes))
        for sequence in engine.requests[name].open:
            # As after a preemption: these depths must be taken again.
            count = (len(outputs) + 1) % 3 * 5
            sequence.depths += torch.randint(1, FORCED.get(router, 3) + 1, (count,), generator=draw).tolist()
            outputs[sequence], names[name, sequence.index] = [], sequence
        # The last request comes when the others have ended and finds what they have left.
        steps = 0
        while step + 1 >= len(together) and engine.has_work:
            for output in engine.step():
                outputs[names[output.request, output.index]].append(output)
            if (steps := steps + 1) == 10:
                engine.abort(2, 0)
    for sequence, parts in outputs.items():
        check_replay(model, sequence, parts)
    assert engine.stats().cached_prompt_tokens > 0
    assert len({tuple(sequence.depths[:9]) for sequence in outputs}) > 1


def noisy_traffic(model: Transformer, options: EngineOptions, deepest: int, seed: int) -> int:
    """Requests that begin alike come, are aborted and preempted by chance; the router decides some tokens by chance.

    Every log-probability must be the one of a full forward pass with the depths that the sequence has recorded.
    Returns the number of prompt tokens that were found in the prefix cache.
    """
    rng = random.Random(seed)
    engine = ServingEngine(model, options)
    add_noise(engine.scheduler, rng, deepest)
    outputs: dict[SequenceState, list[RequestOutput]] = {}
    names: dict[tuple[int, int], SequenceState] = {}
    coming = 9
    while coming or engine.has_work:
        if coming and rng.random() < 0.3:
            coming -= 1
            # Often a prefix that ends where a page does, or beside it.
            length = rng.choice([options.page_size * rng.randint(1, 4) + rng.randint(-1, 1), 13])
            params = SamplingParams(
                max_tokens=rng.randint(1, 6),
                temperature=0,
                logprobs=0,
                n=rng.choice([1, 1, 3]),
                max_depth=rng.choice([None, None, 2]),
                prompt_logprobs=rng.choice([None, None, 0]),
            )
            name = engine.add_request(TEXT[: max(1, min(length, 16))], params)
            for sequence in engine.requests[name].open:
                outputs[sequence], names[name, sequence.index] = [], sequence
        for output in engine.step():
            outputs[names[output.request, output.index]].append(output)
        if engine.requests and rng.random() < 0.02:
            engine.abort(rng.choice([*engine.requests]), rng.choice([None, 0]))
        if len(engine.scheduler.residents) > 1 and rng.random() < 0.05:
            engine.scheduler.preempt(max(engine.scheduler.residents, key=lambda sequence: sequence.number))
        if rng.random() < 0.05:
            engine.scheduler.prefixes.drop_oldest()
    for sequence, parts in outputs.items():
        check_replay(model, sequence, parts)
    assert len(engine.scheduler.free_slots) == engine.options.num_slots
    return engine.stats().cached_prompt_tokens


def check_replay(model: Transformer, sequence: SequenceState, parts: Sequence[RequestOutput]) -> None:
    """The log-probabilities of an answer are those of one full forward pass with its depths."""
    tokens, depths, length = sequence.tokens, sequence.depths, sequence.prompt_length
    table = replayed_logprobs(model, tokens[: len(depths)], depths) if depths else []
    wanted = [row[token] for row, token in zip(table, tokens[1:], strict=False)]
    found = [one.logprob for part in parts for one in part.logprobs or ()]
    assert found == pytest.approx(wanted[length - 1 :][: len(found)], abs=1e-9), sequence.number
    assert len(found) == len(tokens) - length
    given = [one.logprob for part in parts for one in part.prompt_logprobs or () if one is not None]
    assert given == pytest.approx(wanted[: len(given)], abs=1e-9)


def noisy_options(router: str, policy: str, number: int, kv_policy: str) -> tuple[Transformer, EngineOptions]:
    """A model, and an engine with little memory."""
    size = (1, 2, 3, 5)[number % 4]
    model = model_of(router, kv_policy, SHARINGS[number % len(SHARINGS)])
    pages = {pool: count + 24 // size for pool, count in small_pools(model, size).items()}
    return model, EngineOptions(
        policy,  # type: ignore[arg-type]
        hold=1 + number % 2,
        page_size=size,
        chunk_size=(1, size, size + 1, 7)[number // 2 % 4],
        max_resident=2 + number % 4,
        num_pages=pages,
        read_late=number % 3 > 0,
    )


@pytest.mark.promise("R15")
@pytest.mark.parametrize(
    ("router", "policy"),
    [*zip(["fixed", "expert_choice", "token_choice", "skip_forward_recurse", "act_hard"], 2 * POLICIES, strict=False)],
)
def test_noisy_traffic(router: str, policy: str) -> None:
    number = list(ROUTERS).index(router)
    model, options = noisy_options(router, policy, number, SERVED[number % 2])
    assert noisy_traffic(model, options, FORCED.get(router, 3), number) > 0


@pytest.mark.slow
@pytest.mark.promise("R15")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kv_policy", SERVED)
@pytest.mark.parametrize("router", SERVED_ROUTERS)
def test_noisy_traffic_of_every_router(router: str, kv_policy: str, policy: str) -> None:
    number = 3 * list(ROUTERS).index(router) + POLICIES.index(policy)
    for seed in range(4):
        model, options = noisy_options(router, policy, number + seed, kv_policy)
        noisy_traffic(model, options, FORCED.get(router, 3), seed)


@pytest.mark.parametrize("kv_policy", SERVED)
def test_recorded_graphs_are_few_and_shared(kv_policy: str) -> None:
    """Every batch that fits is replayed: rows of all depths, of one or several tokens, with a handful of graphs."""
    model = model_of("expert_choice", kv_policy, "middle_cycle")
    wanted = expected(model)
    for policy in POLICIES:
        engine = check(model, Schedule(policy, 3, 4, recorded=True), wanted)
        graphs = engine.runner.graphs
        assert graphs is not None
        assert {*graphs.recorded} == {(kind, width) for kind in ("entry", "core", "exit") for width in (1, 2, 4, 8, 12)}


def test_preemption_and_prefix_hits_happen() -> None:
    """The schedules above do contain what they should contain."""
    model = model_of("expert_choice", "recursion_wise", "middle_cycle")
    wanted = expected(model)
    engine = check(model, Schedule("depthwise", 3, 4), wanted)
    assert engine.stats().preemptions > 0
    engine = check(model, Schedule("depthwise", 3, 4, small=False), wanted)
    stats, prompts = engine.stats(), sum(len(prompt) * params.n for prompt, params in REQUESTS)
    assert 0 < stats.cached_prompt_tokens < stats.prompt_tokens == prompts
    assert engine.stats().mixed_depths.get(3, 0) + engine.stats().mixed_depths.get(2, 0) > 0


@pytest.mark.parametrize(
    ("policy", "norms", "rank"),
    [*((policy, True, 2) for policy in POLICIES), ("depthwise", True, 0), ("depthwise", False, 2)],
)
def test_recursions_that_differ(policy: str, norms: bool, rank: int) -> None:
    """With per-recursion norms, LoRA and embeddings, or one of them, no call of a block may mix recursions."""
    config = tiny_config(ROUTERS["token_choice"], "recursion_wise", "middle_cycle")
    differing = replace(config.recursion, separate_norms=norms, lora_rank=rank, recursion_embedding=True)
    model = lively_model(replace(config, recursion=differing)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "others" in name or ".up." in name or "recursion_embedding" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    check(model, Schedule(policy, 3, 4), expected(model))


def check_exits(router: str, name: ExitName, kv_policy: str, sharing: str, schedules: Sequence[Schedule]) -> None:
    """Under an exit rule that stops some tokens early, the engine still equals the reference."""
    model = model_of(router, kv_policy, sharing)
    rule = median_rule(model, name)
    model.set_exit(rule)
    try:
        wanted = expected(model)
        for schedule in schedules:
            check(model, schedule, wanted)
    finally:
        model.set_exit(None)


@pytest.mark.parametrize(
    ("router", "name", "kv_policy"),
    [
        *(("fixed", name, kv_policy) for name, kv_policy in zip(EXITS, (*SERVED, *SERVED), strict=True)),
        ("expert_choice", "max_probability", "recursion_wise"),
        ("expert_choice", "acceleration", "share_first"),
        *(("token_choice", name, "recursion_wise") for name in EXITS),
        ("act_hard", "kl", "recursion_wise"),
        ("act_soft", "entropy", "share_first"),
    ],
)
def test_confidence_exits(router: str, name: ExitName, kv_policy: str) -> None:
    number = list(ROUTERS).index(router) + EXITS.index(name)
    check_exits(router, name, kv_policy, "middle_cycle", schedules_for(number)[number % 3 :][:1])


@pytest.mark.slow
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("name", EXITS)
@pytest.mark.parametrize("router", [router for router in SERVED_ROUTERS if router != "fixed_2_of_3"])
def test_confidence_exits_of_every_router(router: str, name: ExitName, sharing: str) -> None:
    for kv_policy in SERVED:
        number = list(ROUTERS).index(router) + EXITS.index(name) + SHARINGS.index(sharing)
        check_exits(router, name, kv_policy, sharing, schedules_for(number))


@pytest.mark.parametrize("policy", POLICIES)
def test_one_continuation_is_aborted(policy: str) -> None:
    """Its siblings continue, also if the aborted one was reading the prompt for them."""
    model = model_of("token_choice", "recursion_wise", "middle_cycle")
    params = SamplingParams(max_tokens=6, temperature=0.9, seed=5, n=3)
    for steps in (1, 3, 12):
        engine = ServingEngine(model, EngineOptions(policy=policy, kv_memory=AMPLE, chunk_size=4))  # type: ignore[arg-type]
        number = engine.add_request(TEXT[:13], params)
        outputs = [output for _ in range(steps) for output in engine.step()]
        engine.abort(number, 0)
        while engine.has_work:
            outputs += engine.step()
        for index in (1, 2):
            found = tuple(token for output in outputs if output.index == index for token in output.tokens)
            assert found == answer(model, TEXT[:13], params, index, None).tokens
        assert not engine.requests
        assert len(engine.scheduler.free_slots) == engine.options.num_slots


@pytest.mark.parametrize(
    "made", [lambda tokens: tokens.pick(torch.zeros(1, 1).long()), lambda _: TokenSet(1, 1, 1, torch.zeros(1).long())]
)
def test_a_router_that_makes_its_own_token_sets(
    made: Callable[[TokenSet], TokenSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExpertChoiceSession, "select_causal", lambda *arguments: (made(arguments[-1]), None))
    engine = ServingEngine(model_of("expert_choice", "recursion_wise", "middle_cycle"))
    engine.add_request(TEXT[:1], SamplingParams())
    with pytest.raises(ConfigError, match=r"recursion 0 .*candidates\.where"):
        engine.step()


@pytest.mark.promise("R15")
@pytest.mark.parametrize("policy", POLICIES)
def test_vanilla(policy: str) -> None:
    model = lively_model(vanilla_config()).eval()
    outputs, _ = serve(model, Schedule(policy, 3, 4, small=False))
    for number in (0, 3, 5):
        got = tuple(token for part in outputs[number, 0] for token in part.tokens)
        assert got == answer(model, *REQUESTS[number], 0, END).tokens


def greedy(model: Transformer, end_token: int | None, **params: object) -> tuple[tuple[int, ...], str | None]:
    """Tokens after a prompt, and why they ended."""
    engine = ServingEngine(model, EngineOptions(kv_memory=AMPLE, end_token=end_token))
    engine.add_request(TEXT[:9], SamplingParams(max_tokens=6, temperature=0, **params))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return tuple(token for output in outputs for token in output.tokens), outputs[-1].finish_reason


def test_where_a_continuation_ends() -> None:
    model = model_of("expert_choice", "recursion_wise", "middle_cycle")
    tokens, reason = greedy(model, None)
    assert (len(tokens), reason) == (6, "length")
    number = next(number for number in range(1, 6) if tokens[number] not in tokens[:number])
    end = tokens[number]
    assert greedy(model, end) == (tokens[: number + 1], "stop")
    assert greedy(model, end, ignore_eos=True) == (tokens, "length")
    # Banned until min_tokens are there, and no longer.
    assert greedy(model, end, min_tokens=number) == (tokens[: number + 1], "stop")
    longer, _ = greedy(model, end, min_tokens=number + 1)
    assert longer[:number] == tokens[:number]
    assert longer[number] != end


@pytest.mark.parametrize("policy", POLICIES)
def test_counters_add_up(policy: str) -> None:
    """Depths, rows and saved rows of all tokens that were read, of which none twice."""
    model = model_of("expert_choice", "recursion_wise", "middle_cycle")
    options = EngineOptions(policy=policy, kv_memory=AMPLE, chunk_size=4, prefix_caching=False)  # type: ignore[arg-type]
    engine = ServingEngine(model, options)
    for prompt in (TEXT[:9], TEXT[:7], TEXT[3:4]):
        engine.add_request(prompt, SamplingParams(max_tokens=5, temperature=0))
    finish(engine)
    stats = engine.stats()
    read = 9 + 7 + 1 + 3 * 4  # the last token of each is never read
    assert sum(stats.depth_counts) == stats.rows["entry"] == stats.rows["exit"] == read
    taken = sum(depth * count for depth, count in enumerate(stats.depth_counts))
    assert 0 < stats.rows_saved == 3 * read - taken
    assert stats.rows["core"] == (3 * read if policy == "full" else taken)
    assert stats.rows["core"] == sum(width * count for width, count in stats.width_counts.items())
    assert engine.accounting.mean_depth == taken / read
    assert (stats.prompt_tokens, stats.generated_tokens) == (17, 15)


def test_both_pools_share_the_memory() -> None:
    """Capacities 1, 2/3, 1/3: a token needs an entry of two edge layers, and two entries of two core layers."""
    model = model_of("expert_choice", "recursion_wise", "middle_cycle")
    memory, page = 1 << 20, 16 * 2 * 2 * 8 * 8  # tokens · keys and values · heads · width · bytes
    pages = ServingEngine(model, EngineOptions(kv_memory=memory)).scheduler.book.num_pages
    assert pages["core"] == pytest.approx(2 * pages["edge"], abs=1)
    used = page * (2 * pages["edge"] + 2 * pages["core"])
    assert memory - 3 * page <= used <= memory


def test_logits_of_a_bf16_model_are_fp32() -> None:
    model = build_model(tiny_config(ROUTERS["expert_choice"])).to(torch.bfloat16).eval()
    runner = ServingEngine(model, EngineOptions(kv_memory=AMPLE)).runner
    assert runner.model.readout(torch.zeros(2, 32, dtype=torch.bfloat16)).dtype == torch.float32


def test_what_can_not_be_served() -> None:
    model = model_of("expert_choice", "recursion_wise", "middle_cycle")
    engine = ServingEngine(model, EngineOptions(num_pages={"edge": 1, "core": 3}, page_size=8))
    for prompt, params, message in (
        ([], SamplingParams(), "empty"),
        ([97], SamplingParams(), "97"),
        ([1] * 20, SamplingParams(max_tokens=9), "context of 24"),
        ([1] * 9, SamplingParams(max_tokens=2), "memory"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.add_request(prompt, params)
    assert not engine.has_work
    with pytest.raises(RequestError, match=r"top_p = 1\.5"):
        SamplingParams(top_p=1.5)
    for policy in ("hybrid", "halted_reuse"):
        config = replace(model.config, recursion=RecursionConfig(3, "middle_cycle", policy))
        with pytest.raises(ConfigError, match=f"{policy} can't be served.*recursion_wise"):
            ServingEngine(Transformer(config))
    with pytest.raises(ConfigError, match=r"granularity = sequence can't be served.*generate"):
        ServingEngine(build_model(tiny_config(ROUTERS["skip_forward_recurse_sequence"])))
    with pytest.raises(ConfigError, match="kv_memory = 100"):
        ServingEngine(model, EngineOptions(kv_memory=100))


def finish(engine: ServingEngine) -> None:
    while engine.has_work:
        engine.step()


def test_a_router_that_ignores_bounds_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("expert_choice", "recursion_wise", "middle_cycle")
    monkeypatch.setattr(RoutingSession, "bounded", lambda self, recursion, chosen, tokens: chosen)
    engine = ServingEngine(model, EngineOptions(kv_memory=AMPLE))
    engine.add_request(TEXT[:12], SamplingParams(max_tokens=9, max_depth=1))
    with pytest.raises(ConfigError, match="where 1 is the bound"):
        finish(engine)


def test_a_preempted_sequence_keeps_its_depths() -> None:
    """Tokens that were computed before keep their depths, even if the router would now decide otherwise."""
    model = lively_model(tiny_config(ROUTERS["expert_choice"])).eval()
    engine = ServingEngine(model, EngineOptions(kv_memory=AMPLE, prefix_caching=False))
    engine.add_request(TEXT[:12], SamplingParams(max_tokens=9, temperature=0))
    while engine.stats().generated_tokens < 4:
        engine.step()
    sequence = engine.scheduler.residents[0]
    before = list(sequence.depths)
    assert model.stage is not None
    with torch.no_grad():
        for weight in model.stage.router.parameters():
            weight.neg_()
    engine.scheduler.preempt(sequence)
    read = 0
    while engine.has_work:
        engine.step()
        if sequence.state == "resident" and sequence.chunk is None:
            # What was computed is what the list says: a table has an entry of every token that took its recursion.
            read = max(read, sequence.num_read)
            for spec, table in zip(engine.scheduler.book.specs, sequence.tables, strict=True):
                assert table.length == sum(spec.holds(depth) for depth in sequence.depths[: sequence.num_read])
    assert read >= len(before)
    assert sequence.depths[: len(before)] == before
    assert len(set(before)) > 1
