import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax.rewards.host import RewardError, check_rewards, submit

IMAGES = np.arange(4.0)[:, None, None] * np.ones((4, 2, 2))
PROMPTS = ["a cat", "a dog", "a cow", "a hen"]


def mean_plus_length(images, prompts):
    return [image.mean() + len(prompt) for image, prompt in zip(images, prompts)]


def fails(message, score, images=IMAGES, prompts=PROMPTS, first=0, **options):
    """Scores, which must bring a RewardError; returns the error's cause."""
    pending = submit(score, images, prompts, first, **options)
    with pytest.raises(RewardError, match=message) as error:
        pending.result()
    return error.value.__cause__


@pytest.fixture
def release():
    """An event that ends the hanging scorers of a test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize(
    "convert", [list, tuple, np.array, jnp.array, lambda x: jnp.array(x, jnp.bfloat16)]
)
def test_values_of_any_kind_become_float32(convert):
    rewards = submit(lambda *a: convert(mean_plus_length(*a)), IMAGES, PROMPTS).result()
    assert rewards.dtype == np.float32
    np.testing.assert_array_equal(rewards, [5, 6, 7, 8])


def test_a_device_array_reaches_the_scorer_as_numpy():
    seen = []

    def score(images, prompts):
        seen.append((type(images), images.dtype, threading.current_thread()))
        return images.sum((1, 2))

    rewards = submit(score, jnp.asarray(IMAGES), PROMPTS).result()
    np.testing.assert_array_equal(rewards, [0, 4, 8, 12])
    ((kind, dtype, thread),) = seen
    assert kind is np.ndarray and dtype == np.float32
    assert thread is not threading.main_thread()


def test_result_can_be_asked_for_again(refused):
    pending = submit(mean_plus_length, IMAGES, PROMPTS)
    assert pending.result() is pending.result()
    pending = submit(lambda *a: 1 / 0, IMAGES, PROMPTS)
    for _ in range(2):
        refused("ZeroDivisionError", pending.result, error=RewardError)


def test_chunks_run_at_the_same_time():
    together = threading.Barrier(3)  # breaks unless three threads meet

    def score(images, prompts):
        together.wait(timeout=20)
        return [len(prompts[0])] * len(prompts)

    pending = [submit(score, IMAGES[:n], PROMPTS[:n], n) for n in (1, 2, 3)]
    assert [p.result().tolist() for p in pending] == [[5], [5, 5], [5, 5, 5]]


def test_submit_does_not_wait_for_the_device(as_shipped, release):
    class Computing:
        """Stands in for an array that the device has not finished yet."""

        shape = (1, 2, 2)

        def __array__(self, dtype=None, copy=None):
            release.wait(20)
            time.sleep(0.3)
            return np.ones(self.shape)

    # The time-out counts from the arrival of the images.
    pending = submit(mean_plus_length, Computing(), ["word"], timeout=0.2)
    assert not release.is_set()
    release.set()
    np.testing.assert_array_equal(pending.result(), [5])


def test_the_callers_memory_may_be_used_again(release):
    def score(images, prompts):
        release.wait(20)
        return images.mean((1, 2)) + len(prompts)

    images, prompts = IMAGES.copy(), list(PROMPTS)
    pending = submit(score, images, prompts)
    images[:] = -1
    prompts.clear()
    release.set()
    np.testing.assert_array_equal(pending.result(), [4, 5, 6, 7])


def test_a_scorer_that_raises_is_reported_with_sample_and_cause():
    def check(message, bad, error, images=IMAGES, prompts=PROMPTS, first=0):
        """Raises where ``bad`` says so of the prompts; returns the prompts of the calls."""
        calls = []

        def score(images, prompts):
            calls.append(prompts)
            assert prompts == [PROMPTS[int(image[0, 0])] for image in images]
            if bad(prompts):
                raise error
            return np.ones(len(prompts))

        assert fails(message, score, images, prompts, first) is error
        return calls

    sample = r"^the scorer raised on sample 102 \(prompt: 'a cow'\): LookupError: none$"
    calls = check(sample, lambda p: "a cow" in p, LookupError("none"), first=100)
    # the search passes one sample at a time, and stops at the first that fails
    assert calls == [PROMPTS, ["a cat"], ["a dog"], ["a cow"]]
    # one sample is not scored twice
    sample = r"sample 3 .*'a hen'.*KeyError: 'word'"
    error = KeyError("word")
    calls = check(sample, lambda p: True, error, IMAGES[3:], PROMPTS[3:], 3)
    assert calls == [["a hen"]]
    chunk = (
        r"raised on samples 8 to 11 \(first prompt: 'a cat'\) \(no sample could be "
        r"singled out\): MemoryError: too many"
    )
    check(chunk, lambda p: len(p) > 1, MemoryError("too many"), first=8)


def test_a_scorer_that_hangs_is_reported(release):
    start = time.monotonic()
    message = (
        r"within 0\.1 s for samples 20 to 23 \(first prompt: 'a cat'\)\. Raise the"
    )
    fails(message, lambda *a: release.wait(60), first=20, timeout=0.1)
    assert time.monotonic() - start < 10


def test_a_hang_in_the_search_keeps_the_first_exception(release):
    def score(images, prompts):
        if len(prompts) > 1:
            raise ConnectionError("server is gone")
        release.wait(60)

    cause = fails("samples 0 to 3.*server is gone", score, timeout=0.2)
    assert isinstance(cause, ConnectionError)


def test_a_hung_scorer_does_not_keep_the_process_alive(run_python):
    code = """
import time
import jax.numpy as jnp
from tmdjax.rewards.host import RewardError, submit
hang = lambda images, prompts: time.sleep(1000)
pending = [submit(hang, jnp.ones((1, 2)), ['p'], timeout=0.1)] * 2
try:
    pending[0].result()
except RewardError as error:
    print(error)
"""
    assert "did not answer within 0.1 s" in run_python(code, timeout=60)


def both_fail(message, values, first):
    """What a scorer returns and what comes from elsewhere is checked alike."""
    fails(message, lambda *a: values, first=first)
    with pytest.raises(RewardError, match=message):
        check_rewards(values, PROMPTS, first)


def test_wrong_number_of_values():
    for values, shape in (
        ([1, 2, 3], r"\(3,\)"),
        (np.ones((4, 1)), r"\(4, 1\)"),
        (1.0, r"\(\)"),
    ):
        message = rf"shape \(4,\); got \w+ of shape {shape} .* sample 7 .*'a cat'"
        both_fail(message, values, 7)


def test_values_that_are_no_numbers():
    # In a list of strings numpy makes strings of all: the first is the culprit then.
    for value, sample in ((None, 6), ("1.0", 5), (1j, 5)):
        message = rf"sample {sample} .* real numbers"
        fails(message, lambda *a, value=value: [1.0, value, 2, 3], first=5)
    ragged = r"sample 0 .*no array of numbers: Value"
    fails(ragged, lambda *a: [1, [2, 3], 4, 5])
    fails(r"got dict of shape \(\)", lambda *a: {"score": [1, 2, 3, 4]})
    fails("SystemExit", lambda *a: exit())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("convert", [list, np.array])
def test_values_that_are_not_finite(value, convert):
    message = r"sample 32 \(prompt: 'a cow'\) is .*; 2 of 4 rewards .*never replac"
    both_fail(message, convert([0.5, 1.0, value, np.nan]), 30)


def test_rewards_of_real_dtypes_and_from_the_device_are_checked(refused):
    dtypes = (bool, np.int8, np.float64, object)
    given = [np.array([0, 1, 1, 0], dtype) for dtype in dtypes]
    for values in (*given, jnp.array([0.0, 1, 1, 0])):
        rewards = check_rewards(values, PROMPTS)
        assert isinstance(rewards, np.ndarray) and rewards.dtype == np.float32
        np.testing.assert_array_equal(rewards, [0, 1, 1, 0])
    nan = jnp.log(-jnp.ones(4))
    refused("sample 0 .*is nan", check_rewards, nan, PROMPTS, error=RewardError)


def test_long_prompts_are_cut_in_messages():
    with pytest.raises(RewardError) as error:
        check_rewards([np.nan], ["x" * 10_000])
    assert len(str(error.value)) < 500 and "xxx..." in str(error.value)


def test_images_that_never_arrive_are_reported():
    images = jnp.ones((2, 3))
    images.delete()
    message = r"images of samples 4 to 5 .*deleted"
    fails(message, mean_plus_length, images, PROMPTS[:2], 4)


def test_bad_input_is_refused_at_once(refused):
    score = mean_plus_length
    shape = r"images has shape \(4, 2, 2\).*batch, 3"
    refused(shape, submit, score, IMAGES, PROMPTS[:3])
    refused("prompts is empty", submit, score, IMAGES[:0], [])
    string = "prompts is one string, 'abcd'; give one"
    refused(string, submit, score, IMAGES, "abcd", error=TypeError)
    refused("prompts is one string", check_rewards, [1.0], "a", error=TypeError)
    for timeout in (0, -1, np.inf, np.nan):
        outside = r"timeout=.* is outside \(0, inf\)"
        refused(outside, submit, score, IMAGES, PROMPTS, timeout=timeout)
    kind = r"first_sample=1\.5"
    refused(kind, submit, score, IMAGES, PROMPTS, 1.5, error=TypeError)
