"""The engine: requests in, batches, tokens out. The scheduler decides, the runner computes, the sampler draws."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan

import torch

from megamor.errors import ConfigError
from megamor.model import Transformer
from megamor.routing.plan import Incoming
from megamor.serve.engine import attention
from megamor.serve.engine.accounting import Accounting
from megamor.serve.engine.cpu_kernels import Kernels, kernels_for
from megamor.serve.engine.flight import UNREAD_TOKEN, Chunk, Marks, ScheduledBatch, SequenceState
from megamor.serve.engine.graphs import Record, cuda_recorder
from megamor.serve.engine.layers import Layers
from megamor.serve.engine.packed import BlockKernels, packed, why_not_packed
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
ADAPT_FIRST, ADAPT_EVERY = 64, 256
# Where the host runs ahead of a GPU, of later core batches one in so many is timed, waiting for it, and a boundary.
TIME_EVERY = 32
# A sequence's number has its turn above these bits, and its order of arrival in them.
TURN_BITS = 40


@dataclass
class Request:
    """A request and those of its continuations that are not finished."""

    params: SamplingParams
    seed: int
    # Tokens that end a continuation.
    stops: tuple[int, ...]
    # Whether every token is the most likely one.
    greedy: bool
    open: list[SequenceState] = field(default_factory=list)
    # Of its last continuation.
    turn: int = -1
    # By position in the prompt, filled chunk by chunk while continuation 0 reads it.
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """What an exit of `chunks` has computed, on its way to the host.

    `tokens` and `logprobs` (where requests ask for them) have one for each chunk that a token was drawn after, at its
    place in `places`. `finite` says of each row whether it has numbers; None where the tokens tell it.
    """

    chunks: Sequence[Chunk]
    places: Mapping[Chunk, int]
    tokens: Incoming | None
    logprobs: Sequence[TokenLogprob | None]
    finite: Incoming | None


class ServingEngine:
    """Implements the `Engine` protocol of `request.py` for one model on one device.

    Raises:
        ConfigError: the model can't be served, or the memory doesn't hold one full context.
    """

    def __init__(self, model: Transformer, options: EngineOptions | None = None) -> None:
        self.options = options or EngineOptions()
        self.layers = Layers.of(model)
        self.unpacked = why_not_packed(model) if self.options.prepacked else "--no-prepacked"
        """Why the products take the weights as they are stored; None if they are prepacked, or stacked on a GPU."""
        self.kernels = self.unpacked or kernels_of(model, self.options.page_size)
        """What computes all but the products, or why torch does."""
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
        self.runner = Runner(model, self.layers, self.scheduler.flight, num_pages, isinstance(kernels, Kernels))
        self.reads_late = self.can_read_late()
        if self.reads_late:
            # One more for the padding of graphs.
            self.runner.drawn = torch.zeros(self.options.max_resident + 1, dtype=torch.int64, device=self.runner.device)
        self.drawn: Drawn | None = None
        """Tokens that the host hasn't read yet, from the last exit."""
        if self.options.cuda_graphs and can_record(self.runner.device):
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

    def can_read_late(self) -> bool:
        """Whether batches are queued before the tokens of the last exit are read."""
        asked = self.options.read_late
        stage = self.model.stage
        # A router that hashes the text needs the tokens on the host.
        reads_text = stage is not None and stage.router.reads_text
        return not reads_text and (self.runner.device.type == "cuda" if asked is None else asked)

    def record_graphs(self, record: Record) -> None:
        """From now on replay batches as graphs."""
        self.runner.record_graphs(self.options.num_slots, record)

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
        seed, stops = secrets.randbits(63) if params.seed is None else params.seed, self.stop_tokens(params)
        changed = Draw(params, seed, 0, prompt, len(prompt), stops[: params.min_tokens]).changes_logits
        request = Request(params, seed, stops, params.temperature == 0 and not changed)
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
        """Run one batch and return what is known of its outputs, and of earlier ones."""
        begin, total = time.perf_counter(), self.accounting.total
        # What is drawn next depends on the tokens before, and so does who has ended.
        outputs = self.read_drawn() if self.scheduler.exits_next else []
        batch = self.scheduler.next()
        if batch is None:
            return outputs + self.read_drawn()
        scheduled = time.perf_counter()
        kept: Marks | None = None
        if batch.kind == "entry":
            kept = self.runner.enter(batch).read()
        elif batch.kind == "core":
            incoming = self.runner.core(batch)
            # Meanwhile the device computes.
            outputs += self.read_drawn()
            kept = incoming.read()
        else:
            self.drawn = self.leave(batch)
        timed = self.synchronizes
        if timed and self.runner.device.type == "cuda":
            torch.cuda.synchronize(self.runner.device)
        ran = time.perf_counter()
        self.accounting.count(batch, ran - scheduled, timed)
        self.scheduler.complete(batch, kept, checked=False)
        if self.drawn is not None and batch.kind == "exit":
            if self.reads_late:
                self.expect_tokens(self.drawn)
            else:
                outputs += self.read_drawn()
        if self.options.hold == 0 and batch.kind == "core":
            launches = total.launches["core"]
            if launches == ADAPT_FIRST or launches % ADAPT_EVERY == 0:
                self.scheduler.hold = self.accounting.best_hold()
        total.seconds["scheduler"] += scheduled - begin + time.perf_counter() - ran
        return outputs

    @property
    def synchronizes(self) -> bool:
        """Whether a batch now has its seconds to itself: where the host may be ahead of the device, few have."""
        launches = self.accounting.total.launches["core"]
        timed = launches < ADAPT_FIRST or launches % TIME_EVERY == 0
        return self.options.synchronize or not self.reads_late or timed

    def leave(self, batch: ScheduledBatch) -> Drawn:
        """Run the exit, and draw a token after each chunk that ends its text."""
        ends, requests, rows, first = list[Chunk](), list[Request](), list[int](), 0
        for chunk in batch.chunks:
            sequence, first = chunk.sequence, first + chunk.length
            request = self.requests[sequence.request]
            if chunk.start + chunk.length == len(sequence.tokens) and request.params.max_tokens > 0:
                ends.append(chunk)
                requests.append(request)
                rows.append(first - 1)
        seats = [chunk.sequence.seat for chunk in ends]
        found = self.runner.exit(batch, rows, seats)
        self.read_prompts(batch.chunks, found.x)
        # NaN reaches rows before its own in the same chunk: attention multiplies it by weights of 0. So others that
        # begin alike must not find such rows in the prefix cache. In decoding the logits tell as much.
        prompts = len(ends) < len(batch.chunks) or first > len(batch.chunks)
        finite = Incoming(found.finite) if prompts else None
        if not ends:
            return Drawn(batch.chunks, {}, None, (), finite)
        tokens, logits = found.tokens, found.logits
        if not all(request.greedy for request in requests):
            tokens = sample(logits, [self.draw(*each) for each in zip(ends, requests, strict=True)])
            self.runner.note_drawn(self.runner.cache.tensor(seats), tokens)
        incoming, logprobs = Incoming(tokens), list[TokenLogprob | None]([None] * len(ends))
        wanted = [request.params.logprobs for request in requests]
        if any(count is not None for count in wanted):
            given = logprobs_of(logits, [max(token, 0) for token in incoming.tolist()], [n or 0 for n in wanted])
            logprobs = [None if count is None else own for own, count in zip(given, wanted, strict=True)]
        return Drawn(batch.chunks, {chunk: place for place, chunk in enumerate(ends)}, incoming, logprobs, finite)

    def expect_tokens(self, drawn: Drawn) -> None:
        """Let sequences that don't end with the token just drawn enter again before it is read."""
        for chunk in drawn.places:
            sequence = chunk.sequence
            if sequence.num_new + 1 < self.requests[sequence.request].params.max_tokens:
                sequence.tokens.append(UNREAD_TOKEN)

    def read_drawn(self) -> list[RequestOutput]:
        """Wait for what the last exit has computed, if it wasn't read yet, and answer."""
        drawn, self.drawn = self.drawn, None
        if drawn is None:
            return []
        outputs, first = list[RequestOutput](), 0
        tokens = [] if drawn.tokens is None else drawn.tokens.tolist()
        finite = None if drawn.finite is None else drawn.finite.tolist()
        for chunk in drawn.chunks:
            place = drawn.places.get(chunk)
            new, logprob = (None, None) if place is None else (tokens[place], drawn.logprobs[place])
            if finite is not None and not all(finite[first : first + chunk.length]):
                new = NO_TOKEN
            first += chunk.length
            if new != NO_TOKEN:
                self.scheduler.remember(chunk)
            outputs += self.answer(chunk, new, logprob)
        return outputs

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

    def draw(self, chunk: Chunk, request: Request) -> Draw:
        """What the sampler must know to draw the token after `chunk`."""
        params, sequence = request.params, chunk.sequence
        banned = request.stops if sequence.num_new < params.min_tokens else ()
        return Draw(params, request.seed, sequence.index, sequence.tokens, sequence.prompt_length, banned)

    def stop_tokens(self, params: SamplingParams) -> tuple[int, ...]:
        """Tokens that end a continuation."""
        end = self.options.end_token
        return params.stop_token_ids if end is None or params.ignore_eos else (*params.stop_token_ids, end)

    def answer(self, chunk: Chunk, new: int | None, logprob: TokenLogprob | None) -> Iterator[RequestOutput]:
        """Append the token `new` drawn after a chunk, if there is one, and finish the continuation if it has ended."""
        sequence, total = chunk.sequence, self.accounting.total
        request = self.requests.get(sequence.request)
        if request is None or sequence not in request.open:
            return  # given up, or another continuation has failed
        if new is None and sequence.unread:
            return  # in the middle of the prompt, or of a text that is read again after a preemption
        if sequence.tokens[-1] == UNREAD_TOKEN:
            sequence.tokens.pop()
        read = request.prompt_logprobs.values() if sequence.num_new == 0 else ()
        if new == NO_TOKEN or any(isnan(each.logprob) for each in read):
            self.abort(sequence.request)
            yield RequestOutput(sequence.request, sequence.index, (), error=NUMERIC_ERROR)
            return
        reason: FinishReason | None = None
        if new is not None:
            sequence.tokens.append(new)
            total.generated_tokens += 1
            if new in request.stops:
                reason = "stop"
        if reason is None and sequence.num_new >= request.params.max_tokens:
            reason = "length"
        prompt_logprobs = None
        if first := sequence.num_new == (new is not None):
            total.prompt_tokens += sequence.prompt_length
            total.cached_prompt_tokens += sequence.cached_tokens or 0
        if first and request.params.prompt_logprobs is not None and sequence.index == 0:
            prompt_logprobs = None, *(request.prompt_logprobs[row] for row in range(1, sequence.prompt_length))
        if reason is not None:
            self.release(sequence)
        yield RequestOutput(
            sequence.request,
            sequence.index,
            tokens=() if new is None else (new,),
            depths=() if new is None else (sequence.depths[-1],),
            logprobs=None if logprob is None else (logprob,),
            prompt_logprobs=prompt_logprobs,
            cached_tokens=sequence.cached_tokens or 0,
            finish_reason=reason,
        )

    def release(self, sequence: SequenceState) -> None:
        """Free what a finished or aborted continuation holds."""
        self.scheduler.remove(sequence)
        request = self.requests[sequence.request]
        request.open.remove(sequence)
        if not request.open:
            del self.requests[sequence.request]

    def stats(self) -> EngineStats:
        return self.accounting.snapshot()


def kernels_of(model: Transformer, page_size: int) -> BlockKernels | str:
    """The kernels for `model`, or why there are none."""
    config, weight = model.config.model, model.embed.weight
    if attention.reads_in_place(weight.device):
        # Here, because it needs Triton, which torch brings along for GPUs only.
        from megamor.serve.engine.gpu_kernels import GpuKernels

        return GpuKernels()
    if weight.device.type != "cpu":
        return f"none for {weight.device.type} without Triton"
    grouped = config.num_heads // config.num_kv_heads
    return kernels_for(weight.dtype, config.head_dim, grouped, page_size)


def can_record(device: torch.device) -> bool:
    """Whether batches on `device` can be CUDA graphs: gathering pages, as without Triton, waits for the GPU."""
    return device.type == "cuda" and attention.reads_in_place(device)


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
