"""Likelihoods and continuations of many token sequences, in batches of similar length that the ranks share.

Batches are dealt to the ranks in turn, and the results gathered, so that every rank returns what one process alone
would. Under FSDP2 and ZeRO-3 a forward pass is collective. Therefore all ranks make equally many passes: one that has
nothing left passes padding alone through the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megamor.codec import TextCodec
from megamor.errors import ConfigError, TextError
from megamor.evaluate.sampling import sample
from megamor.model import KVCache, ModelOutput, Transformer
from megamor.model.loss import CHUNK_ELEMENTS, IGNORE
from megamor.ranks import gather, sum_over_ranks
from megamor.routing import Mode

if TYPE_CHECKING:
    from megamor.load import LoadedModel

T = TypeVar("T")


class Continuation(NamedTuple):
    """A request for at most `max_tokens` tokens after `prompt`, which end where one of the texts `until` begins."""

    prompt: list[int]
    max_tokens: int
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass
class Scorer:
    """A model that scores and continues texts. All methods are collective, and every rank passes the same arguments.

    `call` makes a forward pass (the model, wrapped by the backend of a run) inside a new `context()`. `mode` routes
    likelihoods; continuations follow the inference rule. `dtype` is that of cached keys and values. `before_pass` is
    called on all ranks before each forward pass, and may raise on all of them. `watch` is told how many requests of a
    kind there are, and how many are done.
    """

    model: Transformer
    device: torch.device
    call: Callable[..., ModelOutput]
    mode: Mode = "causal"
    batch_size: int = 16
    dtype: torch.dtype = torch.float32
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    before_pass: Callable[[], None] = lambda: None
    watch: Callable[[str, int, int], None] = lambda what, total, done: None

    @classmethod
    def of(cls, loaded: LoadedModel, **options: Any) -> Scorer:
        """A scorer of a loaded model, which every rank has whole."""
        return cls(loaded.model, loaded.device, loaded.model, dtype=loaded.model.embed.weight.dtype, **options)

    @torch.no_grad()
    def likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """For each context and continuation (token ids) the continuation's log-likelihood in nats, and whether each of
        its tokens is the likeliest one. Contexts that are too long lose their beginning.

        Raises:
            TextError: a continuation is longer than the model's context.
        """
        most = self.model.config.model.max_seq_len
        if (longest := max((len(continuation) for _, continuation in pairs), default=0)) > most:
            raise TextError(f"a continuation of {longest} tokens doesn't fit into the model's context of {most}")
        rows = [(context + continuation)[-most - 1 :] for context, continuation in pairs]

        def score(batch: Sequence[int]) -> Iterator[tuple[float, bool]]:
            lengths = tuple(len(rows[i]) - 1 for i in batch) or (0,)
            inputs = torch.zeros(len(lengths), max(1, *lengths), dtype=torch.int64)
            labels = torch.full_like(inputs, IGNORE)
            for row, i in enumerate(batch):
                ids, own = torch.tensor(rows[i]), slice(lengths[row] - len(pairs[i][1]), lengths[row])
                inputs[row, : lengths[row]], labels[row, own] = ids[:-1], ids[1:][own]
            labels = labels.to(self.device)
            scores = self.forward(inputs, labels=labels, mode=self.mode, lengths=lengths, score_tokens=True).scores
            assert scores is not None
            missed = (labels != IGNORE) & ~scores.correct
            sums, any_missed = scores.nll.double().sum(1), missed.any(1)
            return zip((-sums).tolist(), (~any_missed).tolist(), strict=True)

        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        return self._shared("likelihoods", [order], score, len(pairs))

    @torch.no_grad()
    def continuations(self, requests: Sequence[Continuation], codec: TextCodec) -> list[str]:
        """The texts that follow the prompts, without what ends them. Prompts that are too long lose their beginning.

        Raises:
            ConfigError: likelihoods are routed by a rule that sees later tokens, so that it can't continue a text; or a
                request leaves no room for a prompt.
        """
        most = self.model.config.model.max_seq_len
        if self.mode != "causal":
            raise ConfigError("top-k routing sees later tokens and can't generate: evaluate such tasks causally")
        if (longest := max((request.max_tokens for request in requests), default=0)) >= most:
            raise ConfigError(
                f"a task generates up to {longest} tokens, but the model's context is {most}: set a lower max_gen_toks "
                "in the task's generation_kwargs"
            )
        fitting = [r._replace(prompt=r.prompt[r.max_tokens - most :]) for r in requests]
        order = sorted(range(len(fitting)), key=lambda i: -len(fitting[i].prompt))
        # The sequences in a cache advance together, so they have the same length.
        groups = [list(group) for _, group in groupby(order, key=lambda i: len(fitting[i].prompt))]
        return self._shared(
            "continuations",
            groups,
            lambda batch: self._continue([(i, fitting[i]) for i in batch], codec),
            len(requests),
        )

    def _continue(self, batch: list[tuple[int, Continuation]], codec: TextCodec) -> list[str]:
        """Texts of requests (with their numbers) whose prompts are equally long. Passes stop together on all ranks."""
        requests, live = [request for _, request in batch], list(range(len(batch)))
        generators = [torch.Generator().manual_seed(number) for number, _ in batch]
        new: list[list[int]] = [[] for _ in batch]
        texts = [""] * len(batch)
        cache, unread = None, deque[Tensor]()
        if batch:
            length = len(requests[0].prompt) + max(request.max_tokens for request in requests)
            cache = KVCache(self.model.config.model, len(batch), length, self.dtype, self.device)
            # A pass makes the logits of all its tokens, so a long prompt is read in chunks.
            chunk = max(1, CHUNK_ELEMENTS // (len(batch) * self.model.config.model.vocab_size))
            unread.extend(torch.split(torch.tensor([request.prompt for request in requests]), chunk, dim=1))
        while any(sum_over_ranks([len(live)])):
            if not live:
                self.forward(torch.zeros(1, 1, dtype=torch.int64), mode="causal", lengths=(0,))
                continue
            logits = self.forward(unread.popleft(), mode="causal", cache=cache).logits
            assert logits is not None
            assert cache is not None
            if unread:
                continue
            going = []
            for row, (number, last) in enumerate(zip(live, logits[:, -1].float().cpu(), strict=True)):
                request = requests[number]
                token = sample(last, request.temperature, request.top_p, generators[number])
                ended = codec.end_of_text is not None and token == codec.end_of_text.id
                new[number] += [] if ended else [token]
                texts[number] = codec.decode(new[number])
                ended = ended or any(stop in texts[number] for stop in request.until)
                if not ended and len(new[number]) < request.max_tokens:
                    going.append(row)
            if 0 < len(going) < len(live):
                cache.select(torch.tensor(going, device=self.device))
            live = [live[row] for row in going]
            unread.append(torch.tensor([new[number][-1:] for number in live]))
        pairs = zip(requests, texts, strict=True)
        return [min((text.split(stop)[0] for stop in r.until), key=len, default=text) for r, text in pairs]

    def forward(self, inputs: Tensor, **options: object) -> ModelOutput:
        """One forward pass over `inputs` [B, S] (any device)."""
        self.before_pass()
        with self.context():
            return self.call(inputs=inputs.to(self.device), **options)

    def _shared(
        self, what: str, groups: Iterable[Sequence[int]], work: Callable[[Sequence[int]], Iterable[T]], total: int
    ) -> list[T]:
        """Do `work` for batches of the items in each group, each batch on one rank; results in the order of items."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        size = self.batch_size
        batches = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
        found: list[tuple[int, T]] = []
        done = 0
        for first in range(0, len(batches), world):
            # The last ranks may have nothing in the last turn, but take part in it.
            batch = batches[first + rank] if first + rank < len(batches) else []
            found += zip(batch, work(batch), strict=False)
            done += sum(len(batch) for batch in batches[first : first + world])
            self.watch(what, total, done)
        results = dict(pair for pairs in gather(found) for pair in pairs)
        return [results[item] for item in range(total)]
