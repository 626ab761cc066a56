"""The engine: requests in, batches, tokens out. The scheduler decides, the runner computes, the sampler draws."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from megamor.errors import ConfigError
from megamor.model import Transformer
from megamor.serve.engine.accounting import Accounting
from megamor.serve.engine.graphs import BatchGraphs, CudaRecorder, Record
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
from megamor.serve.engine.scheduler import Chunk, Scheduler, SequenceState
from megamor.serve.options import EngineOptions

ADAPT_EVERY = 256
"""Core batches after which the engine decides again how long to hold exits."""


@dataclass
class Branch:
    """One of the n continuations of a request, as a sequence of its own."""

    request: Request
    index: int
    sequence: SequenceState
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    """By position in the prompt, filled chunk by chunk."""

    @property
    def num_new(self) -> int:
        """Tokens generated so far."""
        return len(self.sequence.tokens) - self.sequence.prompt_length


@dataclass
class Request:
    """A request and those of its continuations that are not finished."""

    number: int
    params: SamplingParams
    seed: int
    open: list[Branch] = field(default_factory=list)


class Sampled(NamedTuple):
    """A token that was drawn, and its log-probability if the request asks for it."""

    token: int
    logprob: TokenLogprob | None


class ServingEngine:
    """Implements the `Engine` protocol of `request.py` for one model on one device.

    Raises:
        ConfigError: the model can't be served, or the memory doesn't hold one full context.
    """

    def __init__(self, model: Transformer, options: EngineOptions | None = None) -> None:
        self.model, self.options = model.eval(), options or EngineOptions()
        self.layers = Layers.of(model)
        num_pages = self.options.num_pages or self.split_memory()
        self.scheduler = Scheduler(self.options, self.layers.num_recursions, self.layers.tables, num_pages)
        if self.options.num_pages is None and not self.scheduler.fits(self.context_length, self.layers.num_recursions):
            raise ConfigError(
                f"kv_memory = {self.options.kv_memory} bytes doesn't hold one context of {self.context_length} tokens: "
                "give more, or a smaller page_size"
            )
        full = self.options.policy == "full"
        self.runner = Runner(model, self.layers, self.options.page_size, num_pages, self.options.num_slots, full)
        if self.options.cuda_graphs and self.runner.device.type == "cuda":
            self.record_graphs(CudaRecorder(self.runner.device))
        self.requests: dict[int, Request] = {}
        self.branches: dict[int, Branch] = {}
        """By number of the sequence."""
        self.num_sequences = self.num_requests = 0
        self.accounting = Accounting(self.scheduler)

    @property
    def context_length(self) -> int:
        """The model's longest sequence."""
        return self.model.config.model.max_seq_len

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    def record_graphs(self, record: Record) -> None:
        """From now on replay batches of up to `max_resident` rows as graphs."""
        widest = self.options.max_resident
        self.runner.graphs = BatchGraphs(self.model.config.model, self.options.page_size, widest, record)

    def split_memory(self) -> dict[str, int]:
        """Pages of each pool, such that both run out after about the same number of tokens.

        A token needs one entry in the edge's table, and in the table of a recursion one with the probability that it
        gets there. A router without capacities may send all tokens to every recursion.
        """
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
            self.branches[state.number] = Branch(request, index, state)
            request.open.append(self.branches[state.number])
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
                f"a prompt of {len(prompt)} tokens and {params.max_tokens} more exceed the context of "
                f"{self.context_length}: shorten the prompt or lower max_tokens"
            )
        num_read = len(prompt) + max(0, params.max_tokens - 1)  # the last one is never read
        if not self.scheduler.fits(num_read, params.max_depth or self.layers.num_recursions):
            raise RequestError(
                f"a prompt of {len(prompt)} tokens and {params.max_tokens} more exceed the memory for keys and values: "
                "lower max_tokens, or start the server with a larger --kv-memory"
            )

    def abort(self, request: int, index: int | None = None) -> None:
        """Drop a request, or one of its continuations; ignored if it is finished or unknown."""
        found = self.requests.get(request)
        for branch in list(found.open) if found else ():
            if index in (None, branch.index):
                self.release(branch)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Run one batch and return its outputs."""
        begin = time.perf_counter()
        batch = self.scheduler.next()
        if batch is None:
            return []
        scheduled = time.perf_counter()
        continuing, sampled = list[list[int]](), dict[Chunk, Sampled]()
        if batch.kind == "entry":
            self.runner.copy(batch.copies)
            continuing = self.runner.enter(batch.chunks)
        elif batch.kind == "core":
            continuing = self.runner.core(batch.chunks)
        else:
            sampled = self.leave(batch.chunks)
        if self.options.synchronize and self.runner.device.type == "cuda":
            torch.cuda.synchronize(self.runner.device)
        ran = time.perf_counter()
        self.accounting.count(batch, ran - scheduled)
        self.scheduler.complete(batch, continuing)
        outputs = self.answer(batch.chunks, sampled) if batch.kind == "exit" else []
        total = self.accounting.total
        if self.options.hold == 0 and batch.kind == "core" and total.launches["core"] % ADAPT_EVERY == 0:
            self.scheduler.hold = self.accounting.best_hold()
        total.seconds["scheduler"] += scheduled - begin + time.perf_counter() - ran
        return outputs

    def leave(self, chunks: Sequence[Chunk]) -> dict[Chunk, Sampled]:
        """Run the exit, and draw a token after each chunk that ends its text."""
        x = self.runner.exit(chunks)
        self.read_prompts(chunks, x)
        ends, rows, first = [], [], 0
        for chunk in chunks:
            first += chunk.length
            branch = self.branches[chunk.sequence.number]
            if chunk.start + chunk.length == len(chunk.sequence.tokens) and branch.request.params.max_tokens > 0:
                ends.append((chunk, branch))
                rows.append(first - 1)
        if not ends:
            return {}
        # Norm and head for these rows alone: those inside a prompt predict tokens that are known.
        logits = self.runner.logits(x[self.runner.tensor(rows)])
        tokens = sample(logits, [self.draw(branch) for _, branch in ends])
        wanted = [branch.request.params.logprobs for _, branch in ends]
        logprobs: Sequence[TokenLogprob | None] = [None] * len(ends)
        if any(count is not None for count in wanted):
            logprobs = logprobs_of(logits, tokens, [count or 0 for count in wanted])
        return {
            chunk: Sampled(token, None if count is None else logprob)
            for (chunk, _), token, logprob, count in zip(ends, tokens, logprobs, wanted, strict=True)
        }

    def read_prompts(self, chunks: Sequence[Chunk], x: torch.Tensor) -> None:
        """Log-probabilities of prompt tokens, where requested; x [N, dim] has the rows of `chunks`."""
        first = 0
        for chunk in chunks:
            branch = self.branches[chunk.sequence.number]
            count = branch.request.params.prompt_logprobs
            # A row predicts the token after it. The last prompt token predicts the first new one, which `leave` draws.
            end = min(chunk.start + chunk.length, chunk.sequence.prompt_length - 1)
            if count is not None and branch.index == 0 and end > chunk.start:
                following = chunk.sequence.tokens[chunk.start + 1 : end + 1]
                logits = self.runner.logits(x[first : first + end - chunk.start])
                found = logprobs_of(logits, following, [count] * len(following))
                branch.prompt_logprobs.update(zip(range(chunk.start + 1, end + 1), found, strict=True))
            first += chunk.length

    def draw(self, branch: Branch) -> Draw:
        """What the sampler must know to draw the next token of `branch`."""
        request, sequence = branch.request, branch.sequence
        banned = self.stop_tokens(request.params) if branch.num_new < request.params.min_tokens else ()
        return Draw(request.params, request.seed, branch.index, sequence.tokens, sequence.prompt_length, banned)

    def stop_tokens(self, params: SamplingParams) -> tuple[int, ...]:
        """Tokens that end a continuation."""
        end = self.options.end_token
        return params.stop_token_ids if end is None or params.ignore_eos else (*params.stop_token_ids, end)

    def answer(self, chunks: Sequence[Chunk], sampled: dict[Chunk, Sampled]) -> list[RequestOutput]:
        """Append the sampled tokens, and finish the continuations that have ended."""
        outputs, total = [], self.accounting.total
        for chunk in chunks:
            sequence, draw = chunk.sequence, sampled.get(chunk)
            branch = self.branches[sequence.number]
            params = branch.request.params
            reason: FinishReason | None = None
            if draw is not None:
                sequence.tokens.append(draw.token)
                total.generated_tokens += 1
                if draw.token in self.stop_tokens(params):
                    reason = "stop"
            elif sequence.unread:
                continue  # in the middle of the prompt, or of a text that is read again after a preemption
            first = branch.num_new == (draw is not None)
            if reason is None and branch.num_new >= params.max_tokens:
                reason = "length"
            if first:
                total.prompt_tokens += sequence.prompt_length
                total.cached_prompt_tokens += sequence.cached_tokens or 0
            outputs.append(
                RequestOutput(
                    branch.request.number,
                    branch.index,
                    tokens=(draw.token,) if draw else (),
                    depths=(sequence.depths[-1],) if draw else (),
                    logprobs=(draw.logprob,) if draw and draw.logprob else None,
                    prompt_logprobs=self.take_prompt_logprobs(branch) if first else None,
                    cached_tokens=sequence.cached_tokens or 0,
                    finish_reason=reason,
                )
            )
            if reason is not None:
                self.release(branch)
        return outputs

    def take_prompt_logprobs(self, branch: Branch) -> tuple[TokenLogprob | None, ...] | None:
        """Those of the whole prompt, if requested."""
        if branch.request.params.prompt_logprobs is None or branch.index > 0:
            return None
        return None, *(branch.prompt_logprobs[position] for position in range(1, branch.sequence.prompt_length))

    def release(self, branch: Branch) -> None:
        """Free what a finished or aborted continuation holds."""
        self.scheduler.remove(branch.sequence)
        del self.branches[branch.sequence.number]
        branch.request.open.remove(branch)
        if not branch.request.open:
            del self.requests[branch.request.number]

    def stats(self) -> EngineStats:
        """A snapshot."""
        return self.accounting.snapshot()
