"""What a run warns of: once each, with value, bound and remedy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import quant
from tmdjax.runtime import LanguageSettings
from tmdjax.runtime.alarms import Alarms
from tmdjax.runtime.publishing import Publisher

SETTINGS = LanguageSettings(prompts=1, samples=2, max_new_tokens=3, microbatch=2)
GOOD = {"mismatch_kl": 1e-3, "effective_sample_fraction": 0.3, "quantised_moved": 0.1}


def said(caplog, *rows, settings=SETTINGS, precision=None):
    caplog.clear()
    alarms = Alarms(settings, precision)
    for row in rows:
        alarms.look({**GOOD, **row})
    return [record.getMessage() for record in caplog.records]


def test_bounds_are_allowed_and_what_is_beyond_is_said_once(caplog):
    assert said(caplog, {}) == []
    pair = quant.Precision(rollout="fp8_block", train="bf16")
    rows = [{"mismatch_kl": 0.0015}, {"mismatch_kl": 0.5}]
    (message,) = said(caplog, *rows, precision=pair)
    for part in (
        "mismatch_kl=0.0015 is above max_mismatch_kl=0.001",
        "rollouts are computed under precision.rollout='fp8_block'",
        "correction='truncate'",
    ):
        assert part in message
    (message,) = said(caplog, *2 * [{"effective_sample_fraction": 0.2}])
    assert "effective_sample_fraction=0.2 is below min_effective_sample" in message
    for name, value in (
        ("mismatch_kl", "nan"),
        ("mismatch_kl", "inf"),  # training gives a written token no probability
        ("effective_sample_fraction", "nan"),
    ):
        (message,) = said(caplog, *2 * [{name: float(value)}])
        assert f"not finite: mismatch_kl={value if 'kl' in name else 0.001}" in message
    loose = LanguageSettings(
        **{**vars(SETTINGS), "max_mismatch_kl": 1, "min_effective_sample_fraction": 0}
    )
    assert not said(caplog, *rows, {"effective_sample_fraction": 0.01}, settings=loose)


def test_a_frozen_policy_is_said_after_so_many_iterations_without_a_change(caplog):
    still, moving = {"quantised_moved": 0.0}, {"quantised_moved": 1e-9}
    assert not said(caplog, *4 * [still], moving, *4 * [still])
    (message,) = said(caplog, moving, *8 * [still])
    assert "published policy frozen" in message and "last 5 iterations" in message
    soon = LanguageSettings(**{**vars(SETTINGS), "frozen_after": 1})
    assert len(said(caplog, still, settings=soon)) == 1
    unquantised = {k: v for k, v in GOOD.items() if k != "quantised_moved"}
    alarms = Alarms(soon)
    caplog.clear()
    alarms.look(unquantised)
    assert not caplog.records


def test_groups_that_are_padded_or_too_small_are_said_once(caplog):
    recipe, ones = quant.RECIPES["fp8_block"], np.ones((130, 7), np.float32)
    rows = np.arange(130)[:, None]
    tiny = [recipe.prepare(ones * x) for x in (1, 1e-5 * (rows < 128) + (rows > 127))]
    tiny += [recipe.prepare(ones * 1e-4), recipe.prepare(ones * 1.2e-4)]
    assert [quant.share_floored(w) for w in tiny] == [0, 0.5, 1, 0]
    assert quant.share_floored(tiny) == 3 / 8 and quant.share_floored(GOOD) == 0
    assert quant.share_padded(tiny) == pytest.approx(1 - 130 * 7 / (256 * 128))
    whole = dataclasses.replace(tiny[0], granularity="tensor", scale=np.ones((1, 1)))
    assert quant.share_padded([whole, GOOD]) == quant.share_padded(None) == 0
    # scales that are powers of two: the least, and the next
    powers = dataclasses.replace(tiny[0], scale=2.0 ** np.array([[-22], [-21]]))
    assert quant.share_floored(powers) == 0.5

    alarms = Alarms(SETTINGS)
    for weights in (None, GOOD, whole, tiny[1], tiny[2], tiny):
        alarms.look(GOOD, {"w": weights})
    padded, floored = (record.getMessage() for record in caplog.records)
    assert padded.startswith("quantised_padded=97.2%: ")
    assert floored.startswith("quantised_floored=100.0%: ")  # half of them is allowed


def test_bounds_out_of_range(refused):
    for name, value in (
        ("max_mismatch_kl", -1.0),
        ("min_effective_sample_fraction", 1.5),
        ("frozen_after", 0),
    ):
        refused(f"{name}={value}", LanguageSettings, **{**vars(SETTINGS), name: value})


def test_weights_are_prepared_once_an_update():
    recipe = quant.RECIPES["fp8_block"]
    publish = Publisher(lambda tree: {"w": recipe.prepare(tree["w"]), "b": tree["b"]})
    random = np.random.default_rng(0)
    w, b = jnp.float32(random.normal(size=(130, 7))), jnp.ones(7)
    first = publish({"w": w, "b": b})
    assert publish({"w": w, "b": b}) is first  # the very arrays
    after = publish({"w": w + 0.1 * (w > 1), "b": b})
    assert after is not first and after["b"] is b  # what stays is not copied
    before, now = map(quant.quantised_values, (first, after))
    other = np.asarray(before[0]).view("u1") != np.asarray(now[0]).view("u1")
    assert 0 < other.mean() < 0.5
    assert quant.share_moved(before, now) == np.float32(other.mean())
    assert quant.share_moved(before, before) == 0
    assert quant.quantised_values({"b": b}) == []
