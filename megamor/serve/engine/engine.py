"""The engine: requests in, launches, tokens out. The scheduler decides, the runner computes, the sampler draws."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megamor.errors import ConfigError
from megamor.model import Transformer
from megamor.serve.engine.accounting import Accounting
from megamor.serve.engine.graphs import CudaRecorder, LaunchGraphs, Record
from megamor.serve.engine.layers import Layers
from megamor.serve.engine.request import (
    EngineStats,
    FinishReason,
    RequestError,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from megamor.serve.engine.runner import Runner
from megamor.serve.engine.sampler import Draw, logprobs_of, sample
from megamor.serve.engine.scheduler import POLICIES, Launch, Limits, Piece, Policy, Scheduler, SequenceState

ADAPT_EVERY = 256
"""Core launches after which the engine thinks again about how long to hold exits."""


@dataclass(frozen=True)
class EngineOptions:
    """How to serve. `kv_memory` is in bytes; `num_pages` of each pool replace it where given.

    `hold` is the number of core launches to a boundary under the policy depthwise; 0 lets the engine choose the best
    for the costs that it measures while it runs. `end_token` ends a continuation unless a request ignores it. On a GPU,
    launches of up to `max_resident` rows are replayed as graphs if `cuda_graphs`; `synchronize` waits for it after each
    launch, so that seconds are those of that launch.
    """

    policy: Policy = "depthwise"
    hold: int = 0
    max_resident: int = 64
    chunk_size: int = 128
    page_size: int = 16
    kv_memory: int = 1 << 30
    num_pages: dict[str, int] | None = None
    prefix_caching: bool = True
    end_token: int | None = None
    cuda_graphs: bool = True
    synchronize: bool = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"policy = {self.policy} is not one of {', '.join(POLICIES)}")
        for name, least in (("hold", 0), ("max_resident", 1), ("chunk_size", 1), ("page_size", 1), ("kv_memory", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least {least}")


@dataclass
class Continuation:
    """One of the n continuations of a request."""

    request: Request
    index: int
    sequence: SequenceState
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)


@dataclass
class Request:
    """A request under way, and those of its continuations that are not finished."""

    number: int
    params: SamplingParams
    seed: int
    open: list[Continuation] = field(default_factory=list)


class ServingEngine:
    """Fulfils the `Engine` protocol of `request.py` for one model on one device."""

    def __init__(self, model: Transformer, options: EngineOptions | None = None) -> None:
        self.model, self.options = model.eval(), options or EngineOptions()
        self.layers = Layers.of(model)
        num_pages = self.options.num_pages or self.split_memory()
        self.limits = Limits(
            num_recursions=self.layers.num_recursions,
            page_size=self.options.page_size,
            tables=self.layers.tables,
            num_pages=num_pages,
            policy=self.options.policy,
            hold=self.options.hold or 1,
            max_resident=self.options.max_resident,
            max_rows=self.options.max_resident + 2 * self.options.chunk_size,
            chunk_size=self.options.chunk_size,
            prefix_caching=self.options.prefix_caching,
        )
        self.scheduler = Scheduler(self.limits)
        if self.options.num_pages is None and not self.scheduler.fits(self.context_length, self.layers.num_recursions):
            raise ConfigError(
                f"kv_memory = {self.options.kv_memory} bytes doesn't hold one context of {self.context_length} tokens: "
                "give more, or a smaller page_size"
            )
        full = self.options.policy == "full"
        self.runner = Runner(model, self.layers, self.options.page_size, num_pages, self.limits.max_rows, full)
        if self.options.cuda_graphs and self.runner.device.type == "cuda":
            self.record_launches(CudaRecorder(self.runner.device))
        self.requests: dict[int, Request] = {}
        self.continuations: dict[int, Continuation] = {}
        self.num_sequences = self.num_requests = 0
        self.accounting = Accounting(self.scheduler)
        self.total = self.accounting.total

    @property
    def context_length(self) -> int:
        """The model's longest sequence."""
        return self.model.config.model.max_seq_len

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    def record_launches(self, record: Record) -> None:
        """Replay launches of up to `max_resident` rows from now on."""
        widest = self.options.max_resident
        self.runner.graphs = LaunchGraphs(self.model.config.model, self.options.page_size, widest, record)

    def split_memory(self) -> dict[str, int]:
        """Pages of each pool: as many tokens in one as in the other, at the share that the router's capacity allows."""
        stage, config = self.model.stage, self.model.config.model
        capacity = getattr(stage.router, "capacity", None) if stage is not None else None
        weight = self.model.embed.weight
        layer_bytes = self.options.page_size * 2 * config.num_kv_heads * config.head_dim * weight.element_size()
        entries = dict.fromkeys(self.layers.in_pool, 0.0)
        for spec in self.layers.tables:
            entries[spec.pool] += capacity[spec.recursion] if capacity and spec.recursion >= 0 else 1.0
        per_token = sum(entries[pool] * count * layer_bytes for pool, count in self.layers.in_pool.items())
        return {pool: int(self.options.kv_memory / per_token * entries[pool]) for pool in self.layers.in_pool}

    def add_request(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a prompt; see `Engine.add_request`."""
        self.check(prompt, params)
        self.num_requests += 1
        seed = secrets.randbits(63) if params.seed is None else params.seed
        request = self.requests[self.num_requests] = Request(self.num_requests, params, seed)
        max_depth = min(params.max_depth or self.layers.num_recursions, self.layers.num_recursions)
        leader: SequenceState | None = None
        for index in range(params.n):
            self.num_sequences += 1
            reuse = params.prompt_logprobs is None or index > 0
            tokens = list(prompt)
            state = SequenceState(self.num_sequences, tokens, len(tokens), max_depth, leader, reuse)
            leader = leader or state
            request.open.append(Continuation(request, index, state))
            self.continuations[state.number] = request.open[-1]
            self.scheduler.add(state)
        return request.number

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Refuse what can't be served."""
        vocab = self.model.config.model.vocab_size
        if not prompt:
            raise RequestError("the prompt is empty: give at least one token")
        unknown = next((token for token in (*prompt, *params.stop_token_ids) if not 0 <= token < vocab), None)
        if unknown is not None:
            raise RequestError(f"token id {unknown} is not in the vocabulary of {vocab}")
        if len(prompt) + params.max_tokens > self.context_length:
            raise RequestError(
                f"a prompt of {len(prompt)} tokens and {params.max_tokens} more don't fit into the context of "
                f"{self.context_length}: shorten the prompt or lower max_tokens"
            )
        num_read = len(prompt) + max(0, params.max_tokens - 1)  # the last one is never read
        if not self.scheduler.fits(num_read, params.max_depth or self.layers.num_recursions):
            raise RequestError(
                f"a prompt of {len(prompt)} tokens and {params.max_tokens} more don't fit into the memory for keys and "
                "values: lower max_tokens, or start the server with more"
            )

    def abort(self, request: int, index: int | None = None) -> None:
        """Drop a request, or one of its continuations; what is finished or unknown is ignored."""
        found = self.requests.get(request)
        for continuation in list(found.open) if found else ():
            if index in (None, continuation.index):
                self.release(continuation)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Run one launch and return what came out of it."""
        begin = time.perf_counter()
        launch = self.scheduler.next()
        if launch is None:
            return []
        scheduled = time.perf_counter()
        outputs, going_on = list[RequestOutput](), list[list[int]]()
        if launch.kind == "entry":
            self.runner.copy(launch.copies)
            going_on = self.runner.enter(launch.pieces)
        elif launch.kind == "core":
            going_on = self.runner.core(launch.pieces)
        else:
            rows, tokens, logprobs = self.leave(launch)
        if self.options.synchronize and self.runner.device.type == "cuda":
            torch.cuda.synchronize(self.runner.device)
        ran = time.perf_counter()
        self.accounting.count(launch, ran - scheduled)
        self.scheduler.complete(launch, going_on)
        if launch.kind == "exit":
            outputs = self.answer(launch.pieces, rows, tokens, logprobs)
        if self.options.hold == 0 and launch.kind == "core" and self.accounting.launches["core"] % ADAPT_EVERY == 0:
            self.scheduler.hold = self.accounting.best_hold()
        self.accounting.seconds["scheduler"] += scheduled - begin + time.perf_counter() - ran
        return outputs

    def leave(self, launch: Launch) -> tuple[list[Piece], list[int], list[TokenLogprob | None]]:
        """Run the exit; the pieces that end a text, a token for each, and its log-probability if wanted."""
        x = self.runner.exit(launch.pieces)
        self.read_prompts(launch.pieces, x)
        ends, rows, first = [], [], 0
        for piece in launch.pieces:
            first += piece.length
            if piece.start + piece.length == len(piece.sequence.tokens) and self.params(piece).max_tokens > 0:
                ends.append(piece)
                rows.append(first - 1)
        if not ends:
            return [], [], []
        logits = self.runner.logits(x[self.runner.tensor(rows)])
        tokens = sample(logits, [self.draw(piece) for piece in ends])
        wanted = [self.params(piece).logprobs for piece in ends]
        if all(count is None for count in wanted):
            return ends, tokens, [None] * len(ends)
        found = logprobs_of(logits, tokens, [count or 0 for count in wanted])
        return ends, tokens, [one if count is not None else None for one, count in zip(found, wanted, strict=True)]

    def read_prompts(self, pieces: Sequence[Piece], x: torch.Tensor) -> None:
        """Log-probabilities of prompt tokens, for those who asked; x holds the rows of `pieces`."""
        first = 0
        for piece in pieces:
            owner, params = self.continuations[piece.sequence.number], self.params(piece)
            end = min(piece.start + piece.length, piece.sequence.prompt_length - 1)
            if params.prompt_logprobs is not None and owner.index == 0 and end > piece.start:
                following = piece.sequence.tokens[piece.start + 1 : end + 1]
                logits = self.runner.logits(x[first : first + end - piece.start])
                found = logprobs_of(logits, following, [params.prompt_logprobs] * len(following))
                owner.prompt_logprobs.update(zip(range(piece.start + 1, end + 1), found, strict=True))
            first += piece.length

    def params(self, piece: Piece) -> SamplingParams:
        """What the request of a piece asks for."""
        return self.continuations[piece.sequence.number].request.params

    def draw(self, piece: Piece) -> Draw:
        """The token that follows a piece."""
        owner, sequence = self.continuations[piece.sequence.number], piece.sequence
        params = owner.request.params
        early = len(sequence.tokens) - sequence.prompt_length < params.min_tokens
        banned = self.stop_tokens(params) if early else ()
        return Draw(params, owner.request.seed, owner.index, sequence.tokens, sequence.prompt_length, banned)

    def stop_tokens(self, params: SamplingParams) -> tuple[int, ...]:
        """Tokens that end a continuation."""
        end = self.options.end_token
        return params.stop_token_ids if end is None or params.ignore_eos else (*params.stop_token_ids, end)

    def answer(
        self,
        pieces: Sequence[Piece],
        ends: Sequence[Piece],
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprob | None],
    ) -> list[RequestOutput]:
        """Append the sampled tokens, and finish what is finished."""
        sampled = {piece: place for place, piece in enumerate(ends)}
        outputs = []
        for piece in pieces:
            sequence = piece.sequence
            owner = self.continuations[sequence.number]
            params, new = owner.request.params, list[int]()
            reason: FinishReason | None = None
            if piece in sampled:
                new = [tokens[sampled[piece]]]
                self.scheduler.extend(sequence, new[0])
                self.total.generated_tokens += 1
                if new[0] in self.stop_tokens(params):
                    reason = "stop"
            elif sequence.unread:
                continue
            first = len(sequence.tokens) - sequence.prompt_length == len(new)
            if reason is None and len(sequence.tokens) - sequence.prompt_length >= params.max_tokens:
                reason = "length"
            if first:
                self.total.prompt_tokens += sequence.prompt_length
                self.total.cached_prompt_tokens += sequence.cached_tokens or 0
            found = logprobs[sampled[piece]] if piece in sampled else None
            outputs.append(
                RequestOutput(
                    owner.request.number,
                    owner.index,
                    tuple(new),
                    (sequence.depths[-1],) if new else (),
                    (found,) if found is not None else None,
                    self.take_prompt_logprobs(owner) if first else None,
                    sequence.cached_tokens or 0,
                    reason,
                )
            )
            if reason is not None:
                self.release(owner)
        return outputs

    def take_prompt_logprobs(self, owner: Continuation) -> tuple[TokenLogprob | None, ...] | None:
        """Those of the whole prompt, if asked for."""
        if owner.request.params.prompt_logprobs is None or owner.index > 0:
            return None
        return None, *(owner.prompt_logprobs[place] for place in range(1, owner.sequence.prompt_length))

    def release(self, owner: Continuation) -> None:
        """A continuation has come to its end, one way or the other; free what it holds."""
        self.scheduler.remove(owner.sequence)
        del self.continuations[owner.sequence.number]
        owner.request.open.remove(owner)
        if not owner.request.open:
            del self.requests[owner.request.number]

    def stats(self) -> EngineStats:
        """A snapshot."""
        return self.accounting.snapshot()
