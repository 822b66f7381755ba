"""The one interface through which rewards run on the host.

A scorer is any ``fn(images [n, ...] numpy, prompts: list of n) -> n numbers``: an OCR
reader, a PickScore or HPS model, a client of a scoring server. It runs in a thread of
its own while the device computes the next chunk:

    pending = [submit(score, images, prompts, start) for start, images, prompts in ...]
    rewards = np.concatenate([p.result() for p in pending])

A scorer that fails is reported with sample and prompt and stops the run; no reward is
ever made up in its place.
"""

import math
import numbers
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tmdjax.core.checks import check_batch, check_count, check_range
from tmdjax.core.types import ArrayLike, Float

Scorer = Callable[[np.ndarray, list[Any]], Any]
"""``fn(images [n, ...], prompts) -> n numbers``, any array or sequence."""

Rewards = Float[np.ndarray, "n"]

_LONGEST_PROMPT = 200


class RewardError(RuntimeError):
    """A reward could not be had; the message names sample and prompt."""


def submit(
    fn: Scorer,
    images: ArrayLike,
    prompts: Sequence[Any],
    first_sample: int = 0,
    *,
    timeout: float = 600.0,
) -> "Pending":
    """Starts to score a chunk of samples in a thread and returns at once.

    A ``jax.Array`` is fetched inside the thread, so the caller may go on to fill the
    device's queue; do not donate it before the result is there. Chunks that are
    pending at the same time run at the same time: ``fn`` must bear that.

    Args:
        fn: the scorer. If it raises, it is called again with one sample at a time to
            find the one at fault.
        images: what is scored, [n, ...]; a numpy array is copied, so its memory may
            be used again.
        prompts: n prompts, or whatever metadata the scorer reads.
        first_sample: number of the chunk's first sample, for messages.
        timeout: seconds that the scorer may take, from the moment the images are on
            the host.

    Returns:
        The handle whose ``result()`` waits for the rewards.

    Raises:
        TypeError: prompts is one string, or first_sample no integer.
        ValueError: no samples, prompts and images of different number, a timeout
            that is not positive and finite.
    """
    first_sample = check_count("first_sample", first_sample, 0)
    check_range("timeout", timeout, 0, math.inf, open_low=True, open_high=True)
    prompts = _prompt_list(prompts)
    check_batch("images", images, len(prompts))
    if isinstance(images, np.ndarray):
        images = images.copy()
    return Pending(fn, images, prompts, first_sample, timeout)


class Pending:
    """A chunk that is being scored; made by :func:`submit`."""

    def __init__(
        self,
        fn: Scorer,
        images: ArrayLike,
        prompts: list[Any],
        first_sample: int,
        timeout: float,
    ):
        self._prompts = prompts
        self._first_sample = first_sample
        self._timeout = timeout
        self._scoring = threading.Event()
        self._done = threading.Event()
        self._deadline = math.inf
        self._cause: BaseException | None = None
        self._error: BaseException | None = None
        self._rewards: np.ndarray | None = None
        # As a daemon, a scorer that hangs cannot keep the process from ending.
        threading.Thread(
            target=self._run,
            args=(fn, images),
            name=f"reward of samples from {first_sample}",
            daemon=True,
        ).start()

    def result(self) -> Rewards:
        """Waits for the rewards.

        Returns:
            float32 [n], all finite. A later call returns the same array.

        Raises:
            RewardError: the scorer raised (the original exception is the cause), took
                longer than the timeout, or returned another number of values, values
                that are no numbers, or NaN or infinity.
        """
        self._scoring.wait()
        remaining = self._deadline - time.monotonic()
        timeout = min(max(remaining, 0), threading.TIMEOUT_MAX)
        if not self._done.wait(timeout):
            if self._cause is not None:  # it hangs in the search for the sample
                raise self._raised("") from self._cause
            raise RewardError(
                f"the scorer did not answer within {self._timeout:g} s for "
                f"{self._chunk()}. Raise the time limit, or give it fewer samples at "
                f"once."
            )
        if self._rewards is None:
            assert self._error is not None
            raise self._error
        return self._rewards

    def _run(self, fn: Scorer, images: ArrayLike) -> None:
        try:
            self._rewards = self._score(fn, images)
        # SystemExit and the like would end the thread in silence.
        except BaseException as error:
            self._error = error
        finally:
            self._scoring.set()
            self._done.set()

    def _score(self, fn: Scorer, images: ArrayLike) -> np.ndarray:
        try:
            batch = np.asarray(images)
        except BaseException as error:
            raise RewardError(
                f"the images of {self._chunk()} did not reach the host: "
                f"{_describe(error)}"
            ) from error
        self._deadline = time.monotonic() + self._timeout
        self._scoring.set()
        try:
            values = fn(batch, list(self._prompts))
        except BaseException as error:
            self._cause = error
            raise self._raised(self._sample_at_fault(fn, batch)) from error
        return check_rewards(values, self._prompts, self._first_sample)

    def _sample_at_fault(self, fn: Scorer, batch: np.ndarray) -> str:
        """Name of the first sample that ``fn`` also fails on alone, or ''."""
        if len(self._prompts) == 1:
            return _name(0, self._prompts, self._first_sample)
        for i, prompt in enumerate(self._prompts):
            try:
                fn(batch[i : i + 1], [prompt])
            except BaseException:
                return _name(i, self._prompts, self._first_sample)
        return ""

    def _raised(self, sample: str) -> RewardError:
        where = sample or f"{self._chunk()} (no sample could be singled out)"
        assert self._cause is not None
        return RewardError(f"the scorer raised on {where}: {_describe(self._cause)}")

    def _chunk(self) -> str:
        last = self._first_sample + len(self._prompts) - 1
        return (
            f"samples {self._first_sample} to {last} "
            f"(first prompt: {_shorten(self._prompts[0])})"
        )


def check_rewards(
    values: Any, prompts: Sequence[Any], first_sample: int = 0
) -> Rewards:
    """Brings rewards to the host and checks them, wherever they were computed.

    Args:
        values: n numbers: an array of any real dtype, or a sequence.
        prompts: the n prompts they belong to.
        first_sample: number of the first of them, for messages.

    Returns:
        float32 [n], all finite.

    Raises:
        RewardError: not n numbers, or NaN or infinity (also by overflow of float32)
            among them; names the first such sample and its prompt.
        TypeError: prompts is one string, or first_sample no integer.
        ValueError: no prompts.
    """
    first_sample = check_count("first_sample", first_sample, 0)
    prompts = _prompt_list(prompts)
    try:
        array = np.asarray(values)
    except Exception as error:
        raise RewardError(
            f"the rewards of {_name(0, prompts, first_sample)} and those after it are "
            f"no array of numbers: {_describe(error)}"
        ) from error
    if array.shape != (len(prompts),):
        raise RewardError(
            f"a scorer must return one number a sample, shape ({len(prompts)},); got "
            f"{type(values).__name__} of shape {array.shape} for the samples from "
            f"{_name(0, prompts, first_sample)} on."
        )
    for i, value in enumerate(array.tolist()):
        if not isinstance(value, numbers.Real):
            raise RewardError(
                f"the reward of {_name(i, prompts, first_sample)} is {value!r}, of "
                f"type {type(value).__name__}; a scorer must return real numbers."
            )
    with np.errstate(over="ignore"):
        rewards = array.astype(np.float32)
    bad = ~np.isfinite(rewards)
    if bad.any():
        first = int(np.argmax(bad))
        raise RewardError(
            f"the reward of {_name(first, prompts, first_sample)} is {array[first]}, "
            f"not a finite float32; {int(bad.sum())} of {len(prompts)} rewards are "
            f"such. Mend the scorer: rewards are never replaced."
        )
    return rewards


def _prompt_list(prompts: Sequence[Any]) -> list[Any]:
    if isinstance(prompts, str):
        raise TypeError(
            f"prompts is one string, {_shorten(prompts)}; give one prompt a sample."
        )
    if not len(prompts):
        raise ValueError("prompts is empty; a chunk has at least one sample.")
    return list(prompts)


def _name(i: int, prompts: Sequence[Any], first_sample: int) -> str:
    return f"sample {first_sample + i} (prompt: {_shorten(prompts[i])})"


def _shorten(prompt: Any) -> str:
    text = repr(prompt)
    return text if len(text) <= _LONGEST_PROMPT else text[:_LONGEST_PROMPT] + "..."


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
