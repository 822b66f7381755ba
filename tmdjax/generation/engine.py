"""The engine: requests in, records out, weights swapped in between.

All programs have fixed shapes: one for drawing, and two for each bucket of text lengths
(prefill, and entering the slots), each compiled once.
"""

import collections
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from tmdjax.core import prng, trees
from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Params
from tmdjax.generation import slots as pure
from tmdjax.generation.sampling import Sampling
from tmdjax.generation.slots import CachedModel, Entry
from tmdjax.rl.token_records import TokenRecord

_LOGGER = logging.getLogger(__name__)
MIN_BUCKET = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes and rules of an engine.

    Attributes:
        slots: texts written side by side.
        length: tokens of the longest text, prompt and response together.
        steps: tokens drawn in each slot by one compiled call; only between calls does
            the host see which texts ended.
        prefill_rows: prompts prefilled at a time.
        sampling: how tokens are drawn.
        stop: ids that end a text; they belong to it.
        stop_strings: texts that end a response wherever they appear in it, in one
            token or across several. The response ends with the token that completes
            one; what was drawn behind it in the same call is dropped.
    """

    slots: int
    length: int
    steps: int = 16
    prefill_rows: int = 4
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, kind, words in (
            ("stop", int, "integers, ids of tokens"),
            ("stop_strings", str, "texts, none of them empty"),
        ):
            given = getattr(self, name)
            found = given if isinstance(given, list | tuple | set) else (None,)
            if kind is int:
                found = [int(x) if isinstance(x, np.integer) else x for x in found]
            if not all(type(x) is kind and x != "" for x in found):
                raise ValueError(f"{name}={given!r}: give a tuple of {words}.")
            object.__setattr__(self, name, tuple(found))
        for name in ("slots", "length", "steps", "prefill_rows"):
            check_count(name, getattr(self, name))


class Engine:
    """Writes responses; holds the slots, the queue and the records under way.

    Not thread-safe: one caller at a time.

    Attributes:
        version: of the weights in use; every token carries it.
        counts: what happened so far, by name: 'submitted', 'stop', 'length', 'aborted',
            'drawn' (tokens, those behind a stop string too), 'prefilled' (tokens,
            padding apart), 'chunks', 'slot_steps' (steps of all slots, idle ones too).
    """

    def __init__(
        self,
        model: CachedModel,
        params: Params,
        config: EngineConfig,
        key: Any,
        version: int = 0,
        *,
        decode: Callable[[Sequence[int]], str] | None = None,
    ):
        """Builds it and allocates the cache.

        Args:
            model: the functions of the language model.
            params: of the model.
            config: sizes and rules.
            key: typed key; a text draws from it with its request's number folded in.
            version: number of these params; it rises with every update.
            decode: text of ids, such as a tokenizer's ``decode``, in which stop strings
                are looked for.

        Raises:
            TypeError: key is not a typed key.
            ValueError: a stop token outside the vocabulary, or stop strings without
                ``decode``.
        """
        prng.check_key(key)
        if config.stop_strings and decode is None:
            raise ValueError(
                f"stop_strings={config.stop_strings} are looked for in text; give the "
                f"engine decode=tokenizer.decode."
            )
        for token in config.stop:
            if not 0 <= token < model.vocab_size:
                raise ValueError(
                    f"stop token {token} is outside the vocabulary of "
                    f"{model.vocab_size}."
                )
        self.model, self.config, self.version = model, config, version
        self._params, self._key, self._decode = params, key, decode
        _LOGGER.info("%s", describe(model, params, config))
        self._state = jax.jit(
            lambda: pure.init_slots(model, config.slots, config.length)
        )()
        self._queue: collections.deque[TokenRecord] = collections.deque()
        self._limits: dict[int, int] = {}
        self._slot: list[TokenRecord | None] = [None] * config.slots
        self.counts: collections.Counter[str] = collections.Counter()
        # prefilled texts that others in the queue wait to share: (cache, row)
        self._shared: dict[tuple[int, ...], tuple[Any, int]] = {}
        self._prefill = jax.jit(functools.partial(pure.prefill, model))
        self._insert = jax.jit(pure.insert, donate_argnums=0)
        self._keys = jax.jit(prng.fold_in)
        self._deactivate = jax.jit(pure.deactivate, donate_argnums=0)
        self._generate = jax.jit(
            lambda params, state: pure.generate(
                model, params, state, config.steps, config.sampling, config.stop
            ),
            donate_argnums=1,
        )

    @property
    def active(self) -> int:
        """Texts in slots."""
        return sum(record is not None for record in self._slot)

    @property
    def queued(self) -> int:
        """Texts that wait for a slot."""
        return len(self._queue)

    def submit(
        self,
        numbers: Iterable[int],
        prompt: Sequence[int],
        *,
        group: int = 0,
        max_new_tokens: int,
    ) -> None:
        """Asks for a response to a prompt under each of some numbers.

        Args:
            numbers: identify the requests, in [0, 2^32), unique among those under way;
                each keys its own randomness.
            prompt: token ids, at least one. Requests for one prompt share its prefill.
            group: number that their records carry, by which advantages group them.
            max_new_tokens: most tokens of each response, over all its segments.

        Raises:
            TypeError: a prompt of anything but integers.
            ValueError: an empty prompt, an id outside the vocabulary, a number in use,
                or a text that could outgrow its slot.
        """
        prompt = tuple(check_count("a token", token, 0) for token in prompt)
        records = [
            TokenRecord(number=int(number), group=group, prompt=prompt)
            for number in numbers
        ]
        if len({record.number for record in records}) < len(records):
            raise ValueError(
                f"request numbers {[r.number for r in records]} are not unique."
            )
        for record in records:
            self._check(record, max_new_tokens)
        for record in records:
            self._admit(record, max_new_tokens)

    def resume(self, record: TokenRecord, *, max_new_tokens: int) -> None:
        """Goes on with an aborted record, which is changed in place.

        Args:
            record: from :meth:`abort`, of this or another engine.
            max_new_tokens: most tokens of the whole response, those so far included.

        Raises:
            ValueError: it is not aborted, malformed, of newer weights than these,
                already as long as that, or what :meth:`submit` refuses.
        """
        record.check()
        if record.status != "aborted":
            raise ValueError(
                f"record {record.number} is {record.status!r}; only an aborted one can "
                f"be resumed."
            )
        if record.versions and record.versions[-1] > self.version:
            raise ValueError(
                f"record {record.number} has tokens of version {record.versions[-1]}, "
                f"but this engine has version {self.version}; update its weights first."
            )
        self._check(record, max_new_tokens)
        self._admit(record, max_new_tokens)
        record.status, record.segments = "running", record.segments + 1

    def _check(self, record: TokenRecord, max_new_tokens: int) -> None:
        check_range("number", record.number, 0, 2**32 - 1)
        check_count("max_new_tokens", max_new_tokens)
        text = (*record.prompt, *record.tokens)
        if not record.prompt:
            raise ValueError(
                f"request {record.number} has an empty prompt; give at least the "
                f"token that starts a text."
            )
        bad = [t for t in text if not 0 <= t < self.model.vocab_size]
        if bad:
            raise ValueError(
                f"request {record.number} has token {bad[0]}, outside the vocabulary "
                f"of {self.model.vocab_size}; was it encoded by another tokeniser?"
            )
        if record.number in self._limits:
            raise ValueError(
                f"request {record.number} is already under way; numbers are unique."
            )
        total = len(record.prompt) + max_new_tokens
        if total > self.config.length:
            raise ValueError(
                f"request {record.number}: a prompt of {len(record.prompt)} and "
                f"max_new_tokens={max_new_tokens} make {total} tokens, but a slot "
                f"holds {self.config.length}; shorten one of them, or raise length "
                f"(memory grows with it)."
            )
        if len(record) >= max_new_tokens:
            raise ValueError(
                f"record {record.number} has {len(record)} tokens already; "
                f"max_new_tokens={max_new_tokens} counts those too."
            )

    def _admit(self, record: TokenRecord, max_new_tokens: int) -> None:
        self._limits[record.number] = max_new_tokens
        self._queue.append(record)
        self.counts["submitted"] += 1

    def advance(self) -> list[TokenRecord]:
        """Fills free slots, draws one chunk, and returns the texts that ended in it."""
        self._fill()
        if not self.active:
            return []
        self._state, drawn = self._generate(self._params, self._state)
        token, log_prob, valid = jax.device_get(drawn)
        self.counts["chunks"] += 1
        self.counts["slot_steps"] += valid.size
        self.counts["drawn"] += int(valid.sum())
        ended, stopped = [], np.zeros(self.config.slots, bool)
        for slot, record in enumerate(self._slot):
            if record is None:
                continue
            live = valid[:, slot]
            record.extend(
                token[live, slot].tolist(), log_prob[live, slot].tolist(), self.version
            )
            end = self._end_of(record, int(live.sum()))
            if end is not None:
                record.cut(end)
                record.status, stopped[slot] = "stop", True
            elif record.tokens[-1] in self.config.stop:
                record.status = "stop"
            elif len(record) >= self._limits[record.number]:
                record.status = "length"
            else:
                continue
            self._slot[slot] = None
            self._forget(record)
            ended.append(record)
        if stopped.any():
            self._state = self._deactivate(self._state, stopped)
        return ended

    def _end_of(self, record: TokenRecord, new: int) -> int | None:
        """How many tokens of the response make its first stop string complete, or None.

        Args:
            record: of which no stop string was complete before.
            new: tokens that it got since.
        """
        decode, marks = self._decode, self.config.stop_strings
        if decode is None or not marks:
            return None

        def found(length: int) -> bool:
            text = decode(record.tokens[:length])
            return any(mark in text for mark in marks)

        if not found(len(record)):
            return None
        ends = range(len(record) - new + 1, len(record) + 1)
        return next(length for length in ends if found(length))

    def run(self) -> list[TokenRecord]:
        """Until nothing is under way; records in the order of their numbers."""
        found = []
        while self.active or self.queued:
            found += self.advance()
        return sorted(found, key=lambda record: record.number)

    def abort(self, numbers: Iterable[int] | None = None) -> list[TokenRecord]:
        """Stops some texts, or all, and returns what was written so far.

        Args:
            numbers: requests to stop; those that are not under way are passed over.
                None means all.

        Returns:
            Their records, 'aborted', in the order of their numbers.
        """
        wanted = set(self._limits if numbers is None else numbers)
        found = [record for record in self._queue if record.number in wanted]
        self._queue = collections.deque(
            record for record in self._queue if record.number not in wanted
        )
        which = np.zeros(self.config.slots, bool)
        for slot, record in enumerate(self._slot):
            if record is not None and record.number in wanted:
                found.append(record)
                self._slot[slot], which[slot] = None, True
        if which.any():
            self._state = self._deactivate(self._state, which)
        for record in found:
            record.status = "aborted"
            self._forget(record)
        return sorted(found, key=lambda record: record.number)

    def update_weights(
        self, params: Params, version: int, *, recompute: bool = True
    ) -> None:
        """Goes on with other weights, from the next token on.

        Args:
            params: same shapes as before.
            version: above the present one, as versions never fall within a text; an
                engine without any text under way takes every version.
            recompute: run the texts under way through the new weights, so that every
                further token is drawn as if the new weights had read its whole text;
                False keeps the keys and values of the old weights, which is cheaper,
                and marks the records ``kv_mixed``.

        Raises:
            ValueError: a version that does not rise while texts are under way.
        """
        if self._limits and version <= self.version:
            raise ValueError(
                f"version={version} must be above the present one, {self.version}, "
                f"while {len(self._limits)} texts are under way; abort them first."
            )
        self._params, self.version = params, version
        self._shared.clear()
        under_way = [(i, r) for i, r in enumerate(self._slot) if r is not None]
        if recompute:
            self._enter(under_way)
        else:
            for _, record in under_way:
                record.kv_mixed = True

    def _forget(self, record: TokenRecord) -> None:
        del self._limits[record.number]
        self.counts[record.status] += 1

    def _fill(self) -> None:
        free = [slot for slot, record in enumerate(self._slot) if record is None]
        entering = []
        while free and self._queue:
            record = self._queue.popleft()
            self._slot[free[0]] = record
            entering.append((free.pop(0), record))
        self._enter(entering)

    def _enter(self, entering: Sequence[tuple[int, TokenRecord]]) -> None:
        """Prefills texts, each distinct one once, and puts them into their slots."""
        texts: dict[tuple[int, ...], list[tuple[int, TokenRecord]]] = {}
        for slot, record in entering:
            text = (*record.prompt, *record.tokens)
            texts.setdefault(text, []).append((slot, record))
        buckets: dict[int, list[tuple[int, ...]]] = {}
        for text in texts:
            if text not in self._shared:
                buckets.setdefault(self._bucket(len(text) - 1), []).append(text)
        rows = self.config.prefill_rows
        for bucket, members in sorted(buckets.items()):
            for i in range(0, len(members), rows):
                some = members[i : i + rows]
                prefilled = self._prefilled(some, bucket) if bucket else None
                self._shared |= {text: (prefilled, j) for j, text in enumerate(some)}
        by_cache: dict[int, list[tuple[int, int, TokenRecord]]] = {}
        for text, members in texts.items():
            prefilled, row = self._shared[text]
            by_cache.setdefault(id(prefilled), []).extend(
                (row, slot, record) for slot, record in members
            )
        caches = {id(self._shared[text][0]): self._shared[text][0] for text in texts}
        for name, chosen in by_cache.items():
            entry = self._entry(chosen)
            self._state = self._insert(self._state, caches[name], entry)
        waiting = {record.prompt for record in self._queue if not record.tokens}
        self._shared = {t: kept for t, kept in self._shared.items() if t in waiting}

    def _bucket(self, length: int) -> int:
        """Smallest power of two that holds it, at most the slot; 0 for nothing."""
        if not length:
            return 0
        return min(max(MIN_BUCKET, 1 << (length - 1).bit_length()), self.config.length)

    def _prefilled(self, texts: Sequence[tuple[int, ...]], bucket: int) -> Any:
        shape = (self.config.prefill_rows, bucket)
        tokens, lengths = np.zeros(shape, np.int32), np.ones(shape[0], np.int32)
        for row, text in enumerate(texts):
            tokens[row, : len(text) - 1] = text[:-1]
            lengths[row] = len(text) - 1
            self.counts["prefilled"] += len(text) - 1
        return self._prefill(self._params, tokens, lengths)

    def _entry(self, chosen: Sequence[tuple[int, int, TokenRecord]]) -> Entry:
        size = self.config.slots
        table = np.zeros((6, size), np.int32)
        numbers = np.zeros(size, np.uint32)
        for i, (row, slot, record) in enumerate(chosen):
            text = (*record.prompt, *record.tokens)
            limit = self._limits[record.number]
            table[:, i] = (
                row,
                slot,
                text[-1],
                len(text) - 1,
                len(record),
                limit - len(record),
            )
            numbers[i] = record.number
        row, slot, token, position, drawn, remaining = table
        return Entry(
            count=np.int32(len(chosen)),
            row=row,
            slot=slot,
            token=token,
            position=position,
            drawn=drawn,
            remaining=remaining,
            key=self._keys(self._key, numbers),
        )


def describe(model: CachedModel, params: Params, config: EngineConfig) -> str:
    """Bytes of weights, cache and logits, before anything is allocated."""
    cache = jax.eval_shape(lambda: model.init_cache(config.slots, config.length))
    parts = {
        "weights": trees.nbytes(params),
        "cache": trees.nbytes(cache),
        "logits": 2 * 4 * config.slots * model.vocab_size,
    }
    listed = ", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in parts.items())
    return (
        f"{config.slots} slots of {config.length} tokens: {listed}; at least "
        f"{sum(parts.values()) / 1e9:.3f} GB at once"
    )
