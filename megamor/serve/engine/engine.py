"""The engine: requests in, batches, tokens out. The scheduler decides, the runner computes, the sampler draws."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isnan

import torch

from megamor.errors import ConfigError
from megamor.model import Transformer
from megamor.serve.engine.accounting import Accounting
from megamor.serve.engine.cpu_kernels import Kernels, kernels_for
from megamor.serve.engine.flight import Chunk, ScheduledBatch, SequenceState
from megamor.serve.engine.graphs import Record, cuda_recorder
from megamor.serve.engine.layers import Layers
from megamor.serve.engine.packed import packed, why_not_packed
from megamor.serve.engine.request import (
    EngineStats,
    FinishReason,
    RequestError,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from megamor.serve.engine.runner import Runner
from megamor.serve.engine.sampler import NO_TOKEN, Draw, logprobs_of, sample
from megamor.serve.engine.scheduler import Scheduler
from megamor.serve.options import CPU_BYTES, GPU_SHARE, EngineOptions

NUMERIC_ERROR = "no next token: the logits are not numbers, or a logits_processor failed or excluded every token"
# Core batches after which the engine decides again how long to hold exits.
ADAPT_EVERY = 256
# A sequence's number has its turn above these bits, and its order of arrival in them.
TURN_BITS = 40


@dataclass
class Request:
    """A request and those of its continuations that are not finished."""

    params: SamplingParams
    seed: int
    open: list[SequenceState] = field(default_factory=list)
    # Of its last continuation.
    turn: int = -1
    # By position in the prompt, filled chunk by chunk while continuation 0 reads it.
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)


# A token that was drawn, and its log-probability if the request asks for it.
Sampled = tuple[int, TokenLogprob | None]


class ServingEngine:
    """Implements the `Engine` protocol of `request.py` for one model on one device.

    Raises:
        ConfigError: the model can't be served, or the memory doesn't hold one full context.
    """

    def __init__(self, model: Transformer, options: EngineOptions | None = None) -> None:
        self.options = options or EngineOptions()
        self.layers = Layers.of(model)
        self.unpacked = why_not_packed(model) if self.options.prepacked else "--no-prepacked"
        """Why the products take the weights as they are stored; None if they are prepacked."""
        self.kernels = self.unpacked or kernels_of(model, self.options.page_size)
        """What attends on a CPU, or why torch does."""
        kernels = None if isinstance(self.kernels, str) else self.kernels
        self.model = model = model.eval() if self.unpacked else packed(model.eval(), kernels)
        memory = kv_bytes(self.options.kv_memory, model.embed.weight.device)
        num_pages = self.options.num_pages or self.split_memory(memory)
        tables, context = self.layers.tables, self.context_length
        self.scheduler = Scheduler(self.options, self.layers.num_recursions, tables, num_pages, context)
        if self.options.num_pages is None and not self.scheduler.fits(self.context_length, self.layers.num_recursions):
            raise ConfigError(
                f"kv_memory = {memory} bytes doesn't hold one context of {self.context_length} tokens: give more, or a "
                "smaller page_size"
            )
        self.runner = Runner(model, self.layers, self.scheduler.flight, num_pages, kernels is not None)
        if self.options.cuda_graphs and self.runner.device.type == "cuda":
            self.record_graphs(cuda_recorder(self.runner.device))
        self.requests: dict[int, Request] = {}
        self.num_sequences = self.num_requests = 0
        self.accounting = Accounting(self.scheduler)

    @property
    def context_length(self) -> int:
        return self.model.config.model.max_seq_len

    @property
    def description(self) -> dict[str, str]:
        config, options, weight = self.model.config, self.options, self.model.embed.weight
        recursions = self.layers.num_recursions
        return {
            "context": f"{self.context_length:,} tokens",
            "recursions": f"up to {recursions}, chosen by the router {config.router.kind}",
            "KV policy": config.recursion.kv_policy,
            "scheduling policy": options.policy,
            "hold": "automatic" if not options.hold else f"{options.hold} core batches",
            "weights": f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}",
        }

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def record_graphs(self, record: Record) -> None:
        """From now on replay batches of up to `max_resident` rows as graphs."""
        self.runner.record_graphs(min(self.options.max_resident, self.options.num_slots), record)

    def split_memory(self, memory: int) -> dict[str, int]:
        """Pages of each pool in `memory` bytes, such that both run out after about the same number of tokens.

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
        return {pool: int(memory / per_token * entries[pool]) for pool in self.layers.in_pool}

    def add_request(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a prompt; see `Engine.add_request`."""
        self.check(prompt, params)
        self.num_requests += 1
        request = Request(params, secrets.randbits(63) if params.seed is None else params.seed)
        if params.group is not None:
            others = (other.turn for other in reversed(self.requests.values()) if other.params.group == params.group)
            request.turn = next(others, -1)
        self.requests[self.num_requests] = request
        # A new request comes into the next round, behind those that wait for that round already. Its number is higher
        # than those of all residents, who keep what they have.
        turn = 1 + max((sequence.number >> TURN_BITS for sequence in self.scheduler.residents), default=-1)
        max_depth = min(params.max_depth or self.layers.num_recursions, self.layers.num_recursions)
        for index in range(params.n):
            self.num_sequences += 1
            request.turn = max(turn, request.turn + 1)
            number = (request.turn << TURN_BITS) + self.num_sequences
            leader = request.open[0] if request.open else None
            reuse = params.prompt_logprobs is None or index > 0
            request.open.append(
                SequenceState(number, [*prompt], len(prompt), max_depth, leader, reuse, self.num_requests, index)
            )
            self.scheduler.add(request.open[-1])
        return self.num_requests

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Refuse what can't be served."""
        vocab = self.model.config.model.vocab_size
        if not prompt:
            raise RequestError("the prompt is empty: give at least one token", "prompt")
        names = ("stop_token_ids", "logit_bias", "allowed_token_ids")
        given = {"prompt": prompt, **{name: getattr(params, name) or () for name in names}}
        for name, tokens in given.items():
            if (unknown := next((token for token in tokens if not 0 <= token < vocab), None)) is not None:
                raise RequestError(f"{name}: token id {unknown} is not in the vocabulary of {vocab}", name)
        allowed = {*(params.allowed_token_ids or ())}
        if params.min_tokens and allowed and allowed <= {*self.stop_tokens(params)}:
            raise RequestError("allowed_token_ids are all stop tokens, which min_tokens hold back", "allowed_token_ids")
        if len(prompt) + params.max_tokens > self.context_length:
            raise RequestError(
                f"a prompt of {len(prompt)} tokens and {params.max_tokens} more exceed the context of "
                f"{self.context_length}: shorten the prompt or lower max_tokens",
                "max_tokens" if len(prompt) < self.context_length else "prompt",
            )
        # The last token is never read: nothing has to be predicted after it.
        num_read = len(prompt) + max(0, params.max_tokens - 1)
        # Refused now: the scheduler serves in order of arrival, so a request that never fits would block all others.
        if not self.scheduler.fits(num_read, params.max_depth or self.layers.num_recursions):
            raise RequestError(
                f"a prompt of {len(prompt)} tokens and {params.max_tokens} more exceed the memory for keys and values: "
                "lower max_tokens, or start the server with a larger --kv-memory",
                "max_tokens",
            )

    def abort(self, request: int, index: int | None = None) -> None:
        """Drop a request, or one of its continuations; ignored if it is finished or unknown."""
        found = self.requests.get(request)
        for sequence in list(found.open) if found else ():
            if index in (None, sequence.index):
                self.release(sequence)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Run one batch and return its outputs."""
        begin = time.perf_counter()
        batch = self.scheduler.next()
        if batch is None:
            return []
        scheduled = time.perf_counter()
        kept, sampled = None, dict[Chunk, Sampled]()
        if batch.kind == "entry":
            kept = self.runner.enter(batch)
        elif batch.kind == "core":
            kept = self.runner.core(batch)
        else:
            sampled = self.leave(batch)
        if self.options.synchronize and self.runner.device.type == "cuda":
            torch.cuda.synchronize(self.runner.device)
        # The host may be ahead of a GPU here: only a batch that had to know which rows continue, or which tokens were
        # drawn, has waited for it.
        ran = time.perf_counter()
        self.accounting.count(batch, ran - scheduled)
        self.scheduler.complete(batch, kept)
        outputs = self.answer(batch.chunks, sampled) if batch.kind == "exit" else []
        total = self.accounting.total
        if self.options.hold == 0 and batch.kind == "core" and total.launches["core"] % ADAPT_EVERY == 0:
            self.scheduler.hold = self.accounting.best_hold()
        total.seconds["scheduler"] += scheduled - begin + time.perf_counter() - ran
        return outputs

    def leave(self, batch: ScheduledBatch) -> dict[Chunk, Sampled]:
        """Run the exit, and draw a token after each chunk that ends its text; `NO_TOKEN` for one that is broken."""
        x, chunks = self.runner.exit(batch), batch.chunks
        self.read_prompts(chunks, x)
        sampled = self.draw_tokens(chunks, x)
        if any(chunk.length > 1 or chunk not in sampled for chunk in chunks):
            # NaN reaches rows before its own in the same chunk: attention multiplies it by weights of 0. So others that
            # begin alike must not find such rows in the prefix cache. In decoding the logits tell as much.
            finite = torch.split(x.isfinite().all(1).cpu(), [chunk.length for chunk in chunks])
            sampled |= {chunk: (NO_TOKEN, None) for chunk, own in zip(chunks, finite, strict=True) if not own.all()}
        for chunk, (token, _) in sampled.items():
            chunk.sequence.broken = token == NO_TOKEN
        return sampled

    def draw_tokens(self, chunks: Sequence[Chunk], x: torch.Tensor) -> dict[Chunk, Sampled]:
        """A token after each chunk that ends a text, where one is wanted; x [N, dim] has the rows of `chunks`."""
        ends, rows, first = [], [], 0
        for chunk in chunks:
            first += chunk.length
            request = self.requests[chunk.sequence.request]
            if chunk.start + chunk.length == len(chunk.sequence.tokens) and request.params.max_tokens > 0:
                ends.append((chunk, request))
                rows.append(first - 1)
        if not ends:
            return {}
        # Norm and head for these rows only: those inside a prompt predict tokens that are known.
        logits = self.model.readout(x[self.runner.cache.tensor(rows)])
        tokens = sample(logits, [self.draw(chunk.sequence, request) for chunk, request in ends])
        wanted = [request.params.logprobs for _, request in ends]
        logprobs: Sequence[TokenLogprob | None] = [None] * len(ends)
        if any(count is not None for count in wanted):
            logprobs = logprobs_of(logits, [max(token, 0) for token in tokens], [count or 0 for count in wanted])
        return {
            chunk: (token, None if count is None else logprob)
            for (chunk, _), token, logprob, count in zip(ends, tokens, logprobs, wanted, strict=True)
        }

    def read_prompts(self, chunks: Sequence[Chunk], x: torch.Tensor) -> None:
        """Log-probabilities of prompt tokens, where requested; x [N, dim] has the rows of `chunks`."""
        first = 0
        for chunk in chunks:
            sequence, request = chunk.sequence, self.requests[chunk.sequence.request]
            count = request.params.prompt_logprobs
            # A row predicts the token after it. The last prompt token predicts the first new one, which `leave` draws.
            end = min(chunk.start + chunk.length, sequence.prompt_length - 1)
            if count is not None and sequence.index == 0 and end > chunk.start:
                following = sequence.tokens[chunk.start + 1 : end + 1]
                logits = self.model.readout(x[first : first + end - chunk.start])
                found = logprobs_of(logits, following, [count] * len(following))
                request.prompt_logprobs.update(zip(range(chunk.start + 1, end + 1), found, strict=True))
            first += chunk.length

    def draw(self, sequence: SequenceState, request: Request) -> Draw:
        """What the sampler must know to draw the next token of `sequence`."""
        params = request.params
        banned = self.stop_tokens(params) if sequence.num_new < params.min_tokens else ()
        return Draw(params, request.seed, sequence.index, sequence.tokens, sequence.prompt_length, banned)

    def stop_tokens(self, params: SamplingParams) -> tuple[int, ...]:
        """Tokens that end a continuation."""
        end = self.options.end_token
        return params.stop_token_ids if end is None or params.ignore_eos else (*params.stop_token_ids, end)

    def answer(self, chunks: Sequence[Chunk], sampled: dict[Chunk, Sampled]) -> list[RequestOutput]:
        """Append the sampled tokens, and finish the continuations that have ended."""
        outputs, total = [], self.accounting.total
        for chunk in chunks:
            sequence = chunk.sequence
            request = self.requests.get(sequence.request)
            if request is None:
                continue  # another continuation has failed in this batch
            if chunk not in sampled and sequence.unread:
                continue  # in the middle of the prompt, or of a text that is read again after a preemption
            new, logprob = sampled.get(chunk, (None, None))
            reason: FinishReason | None = None
            read = request.prompt_logprobs.values() if sequence.num_new == 0 else ()
            if new == NO_TOKEN or any(isnan(each.logprob) for each in read):
                outputs.append(RequestOutput(sequence.request, sequence.index, (), error=NUMERIC_ERROR))
                self.abort(sequence.request)
                continue
            if new is not None:
                sequence.tokens.append(new)
                total.generated_tokens += 1
                if new in self.stop_tokens(request.params):
                    reason = "stop"
            if reason is None and sequence.num_new >= request.params.max_tokens:
                reason = "length"
            prompt_logprobs = None
            if first := sequence.num_new == (new is not None):
                total.prompt_tokens += sequence.prompt_length
                total.cached_prompt_tokens += sequence.cached_tokens or 0
            if first and request.params.prompt_logprobs is not None and sequence.index == 0:
                prompt_logprobs = None, *(request.prompt_logprobs[row] for row in range(1, sequence.prompt_length))
            outputs.append(
                RequestOutput(
                    sequence.request,
                    sequence.index,
                    tokens=() if new is None else (new,),
                    depths=() if new is None else (sequence.depths[-1],),
                    logprobs=None if logprob is None else (logprob,),
                    prompt_logprobs=prompt_logprobs,
                    cached_tokens=sequence.cached_tokens or 0,
                    finish_reason=reason,
                )
            )
            if reason is not None:
                self.release(sequence)
        return outputs

    def release(self, sequence: SequenceState) -> None:
        """Free what a finished or aborted continuation holds."""
        self.scheduler.remove(sequence)
        request = self.requests[sequence.request]
        request.open.remove(sequence)
        if not request.open:
            del self.requests[sequence.request]

    def stats(self) -> EngineStats:
        return self.accounting.snapshot()


def kernels_of(model: Transformer, page_size: int) -> Kernels | str:
    """The kernels for `model` on a CPU, or why there are none."""
    config = model.config.model
    grouped = config.num_heads // config.num_kv_heads
    return kernels_for(model.embed.weight.dtype, config.head_dim, grouped, page_size)


def kv_bytes(asked: float, device: torch.device) -> int:
    """Bytes for keys and values on `device`, where the model is already; `asked` as in `EngineOptions.kv_memory`.

    Raises:
        ConfigError: a fraction for a device that isn't a GPU.
    """
    if device.type == "cuda" and asked < 1:
        # What the model's loading has cached for good counts as free: the allocator gives it back or uses it again.
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * (asked or GPU_SHARE))
    if 0 < asked < 1:
        raise ConfigError(
            f"kv_memory = {asked:.0%} is a share of a GPU's free memory: on {device.type} give bytes, as 8GiB"
        )
    return int(asked) or CPU_BYTES
