"""A clip range that is calibrated as a run goes, on the engine of the other runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import same
from test_lm_rl import KEY, PARAMS, SETTINGS, TWICE, engine, log_probs, made

from tmdjax.systems import grpo

OBJECTIVE = grpo.preset("grpo", calibrate_every=2, clip_range=(0.02, 0.03))


def half(*given):
    """Exact arithmetic, by which ratios move half as far."""
    return tuple(x / 2 for x in log_probs(*given))


@functools.cache
def iteration():
    settings = dataclasses.replace(SETTINGS, **TWICE)
    return made(OBJECTIVE, optax.adam(1e-2), settings, shadow=half)


@functools.cache
def whole():
    """States and metrics of three iterations."""
    engine()
    state, found = iteration().init(PARAMS), []
    for _ in range(3):
        state, metrics = iteration()(state, None, KEY)
        found.append((jax.tree.map(np.asarray, state), metrics))
    return found


def test_the_range_is_that_of_exact_arithmetic_from_the_next_iteration_on():
    (first, told), (second, later), (third, again) = whole()
    # ratios whose square roots are beyond the range: near bounds of 0.98^2 and 1.03^2
    assert first.clip_range == pytest.approx((0.0396, 0.0609), rel=0.25)
    assert (told["clip_low"], told["clip_high"]) == pytest.approx((0.02, 0.03))
    assert (later["clip_low"], later["clip_high"]) == tuple(first.clip_range)
    # so fewer are clipped than before; shares tell how many too many there were
    assert told["negative_clipped"] > told["negative_clipped_exact"] > 0
    assert told["positive_clipped"] > told["positive_clipped_exact"] > 0
    # every second iteration is due
    np.testing.assert_array_equal(first.clip_range, second.clip_range)
    assert "negative_clipped" not in later and "negative_clipped" in again
    assert (third.clip_range != second.clip_range).all()
    # the first iteration was clipped by the objective's own, in a program for all
    assert iteration().programs["update"]._cache_size() == 1


def test_killed_and_resumed_it_goes_on_with_its_range():
    (_, _), (second, _), (third, metrics) = whole()
    engine()
    state = jax.tree.map(jnp.asarray, second)
    resumed, found = iteration()(state, None, KEY)
    same(resumed, third)
    assert found == metrics


def test_what_cannot_be_calibrated(refused):
    twice = dataclasses.replace(SETTINGS, **TWICE)
    make = functools.partial(made, OBJECTIVE, optax.sgd(0.1))
    refused("exact arithmetic; give shadow=", make, twice)
    message = "calibrate_every=2 with one update an iteration"
    refused(message, make, SETTINGS, shadow=half)
    refused("calibrate_every=-1", grpo.preset, "grpo", calibrate_every=-1)
    message = "calibrate_every=5 has no meaning for surrogate='cispo'; use 0"
    refused(message, grpo.preset, "cispo", calibrate_every=5)
