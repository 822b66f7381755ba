"""Claims about time: closed forms of simulated runs, and what is measured of them."""

import functools

import numpy as np
import pytest

from experiments import scheduling, simulated_runs
from experiments.arms import of_arm
from experiments.simulated_runs import lognormal_lengths, schedule_of
from experiments.work_rates import Rates, measured_rates
from tmdjax.harness import ConfigError, load_config
from tmdjax.harness.config import to_plain

RATES = Rates(step=0.02, occupancy=0.4, prefill=0.0, learn=1e-3, swap=0.0)
BATCH, SAMPLES, SLOTS, PROMPT, CHUNK = 8, 4, 4, 8, 4
MEAN, LONGEST = 24, 160


@functools.cache
def run(name="areal", sigma=1.0, updates=4, rates=RATES, devices=8, whole=False, **of):
    """Eight devices have a slot for each response of a batch; two of them may train."""
    schedule = schedule_of(
        name,
        batch=BATCH,
        samples=SAMPLES,
        updates=updates,
        max_new_tokens=LONGEST,
        slots=SLOTS,
        **of,
    )
    return simulated_runs.simulate(
        schedule,
        rates,
        lognormal_lengths(MEAN, sigma, LONGEST, 0),
        devices=devices,
        train=max(1, devices // 4),
        chunk=CHUNK,
        prompt=PROMPT,
        interruptible=not whole,
    )


def measured(*given, **of):
    return simulated_runs.measured(run(*given, **of))


def test_a_full_step_takes_as_long_however_much_goes_with_occupied_slots():
    for occupancy in (0.0, 0.4, 1.0):
        rates = Rates(**{**vars(RATES), "occupancy": occupancy})
        costs = rates.costs(slots=SLOTS, trainers=2)
        for texts in (1, SLOTS):
            step = {"slot_steps": SLOTS, "drawn": texts, "prefilled": 0}
            expected = 0.02 * (1 - occupancy + occupancy * texts / SLOTS)
            assert costs.seconds("decode", step) == pytest.approx(expected)
        assert costs.seconds("learn", {"tokens": 10}) == pytest.approx(5e-3)


def test_rates_are_found_again_in_a_run_that_took_them():
    rates = Rates(step=0.02, occupancy=0.4, prefill=1e-4, learn=1e-3, swap=0.05)
    found, costs = measured_rates(run(rates=rates, devices=2).events, SLOTS, "here")
    shared = Rates(**{**vars(rates), "learn": rates.learn / 2})  # by two trainers
    assert vars(found) == pytest.approx(vars(shared), rel=1e-6)
    assert costs.source == "here"


def test_equal_lengths_take_what_one_computes_by_hand():
    updates, generate = 12, MEAN * RATES.step
    learn = BATCH * SAMPLES * (PROMPT + MEAN) * RATES.learn
    sync = measured(sigma=0.0, updates=updates)
    assert sync["hours"] == pytest.approx(updates * (generate + learn / 8) / 3600)
    assert sync["generate_busy"] == pytest.approx(generate / (generate + learn / 8))
    assert sync["off_policy"] == sync["lag_max"] == sync["discarded"] == 0
    # side by side it is the slower role that all wait for
    overlapped = measured(sigma=0.0, updates=updates, eta=4)
    slower = max(generate * BATCH * SAMPLES / (6 * SLOTS), learn / 2)
    hours = updates * slower / 3600
    assert hours <= overlapped["hours"] <= 1.15 * hours
    # all slots are full, so that beginning more groups gains nothing, and loses nothing
    more = measured("april", sigma=0.0, updates=updates, factor=2)
    assert more["rollout"] == pytest.approx(sync["rollout"], rel=0.1)


def test_measures_tell_schedules_apart():
    sync, four = measured(), measured(eta=4)
    whole = measured(eta=4, whole=True)
    assert four["first_batch"] == whole["first_batch"] > 0
    assert four["generated"] > whole["generated"]
    assert 0 < four["off_policy"] < 1 <= four["lag_max"] <= 4
    more, thrown = measured("april", factor=2), measured("april", recycle=False)
    assert more["discarded"] == sync["discarded"] == 0
    assert more["rollout"] > sync["rollout"] and more["off_policy"] > 0
    assert thrown["off_policy"] == 0
    thrown = measured("april", factor=2, recycle=False)
    assert thrown["discarded"] > 0 and thrown["length_ratio"] < more["length_ratio"]
    assert sync["length_ratio"] == pytest.approx(1)


def test_devices_work_or_have_a_reason_to_wait():
    for found in (run(), run(eta=4), run("april", factor=2)):
        waits = simulated_runs.shares_of_waits(found)
        for role, busy in (("generate", "generate_busy"), ("train", "train_busy")):
            share = simulated_runs.measured(found)[busy]
            assert sum(waits[role].values()) + share == pytest.approx(1)
        lags = simulated_runs.shares_of_lags(found)
        assert lags.sum() == pytest.approx(1)
        assert 1 - lags[0] == pytest.approx(
            simulated_runs.measured(found)["off_policy"]
        )


def test_lengths_have_the_mean_that_was_asked_for_and_one_order():
    count, logs = range(2000), []
    for sigma in (0.0, 0.3, 1.0):
        length_of = lognormal_lengths(256, sigma, 10**5, seed=1)
        lengths = np.array([length_of(number) for number in count])
        assert lengths.mean() == pytest.approx(256, rel=0.1)
        assert np.log(lengths).std() == pytest.approx(sigma, abs=0.03)
        logs.append(np.log(lengths))
    assert np.corrcoef(logs[1:])[0, 1] > 0.99  # the longest are so under any sigma
    cut = lognormal_lengths(256, 1.0, 300, seed=1)
    assert max(map(cut, range(100))) == 300


def test_a_case_has_the_costs_that_were_measured_but_for_its_own():
    config = load_config("configs/scheduling.py:cpu")
    given = to_plain(of_arm(config, "areal_4"))
    found = {**vars(RATES), "step": 0.7, "occupancy": 0.1, "prefill": 1e-4}
    for case, occupancy in (("heavy", 0.1), ("middle_busy", 1), ("middle_fixed", 0)):
        rates = scheduling.rates_of(given, found, given["cases"][case])
        assert (rates.step, rates.occupancy) == (0.7, occupancy)
    unread = scheduling.rates_of(given, found, given["cases"]["constant_unread"])
    assert unread.prefill == 0 and unread.learn < rates.learn
    own = given["cases"]["heavy_measured"]
    assert scheduling.rates_of(given, found, own) == Rates(**found)
    given["costs"]["measured"] = False
    assert scheduling.rates_of(given, found, own).step == given["costs"]["step"]


def test_a_share_of_rollouts_is_that_of_a_synchronous_update_of_equal_lengths():
    rates = RATES.with_rollout_share(0.75, slots=SLOTS, prompt=PROMPT, response=MEAN)
    sync = measured(sigma=0.0, rates=rates)
    assert sync["generate_busy"] == pytest.approx(0.75)
    assert sync["train_busy"] == pytest.approx(0.25)


def test_bad_inputs(refused):
    def described(*changes):
        scheduling.describe(load_config("configs/scheduling.py:smoke", changes))

    for change, words in (
        ("devices.train=8", "at least one device must train, and one generate"),
        ("workload.cases=(heavy,heavier)", "workload.cases='heavier' is not one of"),
        (
            "compare.baseline=synk",
            "compare.baseline='synk' is not one of .*Did you mean",
        ),
        ("calibrate.warm=4", "calibrate.warm=4 leaves nothing to measure"),
        ("engine.length=20", "need engine.length of at least 32, not 20"),
        ("workload.mean=200", "mean=200 is outside"),
        ("arms.april_2.schedule.factr=3", "factr"),
    ):
        with pytest.raises((ConfigError, TypeError, ValueError), match=words):
            described(change)
    refused("at least one device", simulated_runs.roles, run().schedule, 1, 1)
    refused("occupancy=2", Rates, **{**vars(RATES), "occupancy": 2})
    of = {"slots": SLOTS, "prompt": PROMPT, "response": MEAN}
    refused("rollout_share=1 is outside", RATES.with_rollout_share, 1, **of)
    refused("no step of decode, learn, weights", measured_rates, [], 4, "here")
