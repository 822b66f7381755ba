"""AReaL's rules; the numbers are those of the invariants of its sheet.

Its scheduling (1 to 3, 9, 10, 12) is tested where it lives, in tests/runtime; packing
(8) in tests/rl/test_token_records.py and, with gradients, in tests/runtime/test_lm_rl.py.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import rl, runtime
from tmdjax.rl import TokenBatch, TokenRecord
from tmdjax.runtime import LanguageSettings, Schedule, UpdateBatch
from tmdjax.systems import areal

RNG = np.random.default_rng(0)
MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
BEHAVIOUR = np.float32(RNG.normal(-1.5, 0.3, MASK.shape))
PROXIMAL = np.float32(BEHAVIOUR + RNG.normal(0, 0.5, MASK.shape))
PROXIMAL[1, 2] = BEHAVIOUR[1, 2] + 2  # a ratio above 5: rejected
LOG_PROB = np.float32(PROXIMAL + RNG.normal(0, 0.3, MASK.shape))
ADVANTAGE = np.float32(RNG.choice([1.0, -2.0, 0.5], MASK.shape))
LOG_PROB[1, 0] = PROXIMAL[1, 0] + np.sign(ADVANTAGE[1, 0]) / 2  # clipped
WEIGHT = np.float32(MASK / MASK.sum())
AREAL, NAIVE = areal.preset("areal"), areal.preset("naive")


def batch_of(proximal, behaviour, mask=MASK, advantage=ADVANTAGE):
    texts = TokenBatch(*[None] * 5, mask, behaviour, None, None, None)
    return UpdateBatch(texts, advantage, None, proximal, None, None, None)


@functools.partial(jax.jit, static_argnums=0)
def graded(objective, log_prob, proximal, behaviour, mask, weight):
    """The loss, its gradients to all log-probs, and the loss of each token."""

    def total(*log_probs):
        each, _ = objective.loss(log_probs[0], batch_of(*log_probs[1:], mask))
        return jnp.sum(jnp.where(weight > 0, each, 0) * weight), each

    value = jax.value_and_grad(total, (0, 1, 2), has_aux=True)
    return value(log_prob, proximal, behaviour)


def found(objective=AREAL, log_prob=LOG_PROB, proximal=PROXIMAL, behaviour=BEHAVIOUR):
    (loss, each), gradients = graded(
        objective, log_prob, proximal, behaviour, MASK, WEIGHT
    )
    return float(loss), np.array(each), [np.asarray(g) for g in gradients]


def decoupled(log_prob, proximal, behaviour):
    """The loss of each token by the sheet, in float64; 0 where masked or rejected."""
    u, w = np.exp(log_prob - proximal), np.exp(np.float64(proximal) - behaviour)
    loss = np.maximum(-ADVANTAGE * u, -ADVANTAGE * np.clip(u, 0.8, 1.2))
    return np.where(MASK & (w <= 5), w * loss, 0)


def differences(loss, log_prob, step=1e-6):
    """Central finite differences of a loss, in float64."""
    slope = np.zeros(log_prob.shape)
    for at in np.ndindex(log_prob.shape):
        shift = np.zeros(log_prob.shape)
        shift[at] = step
        slope[at] = (loss(log_prob + shift) - loss(log_prob - shift)) / (2 * step)
    return slope


def test_4_the_decoupled_loss_by_finite_differences():
    loss, each, (slope, *constants) = found()
    expected = decoupled(np.float64(LOG_PROB), PROXIMAL, BEHAVIOUR)
    assert (expected == 0).sum() == (~MASK).sum() + 1  # one token is rejected
    assert_allclose(each, expected, rtol=2e-5)
    assert_allclose(loss, expected.sum() / MASK.sum(), rtol=1e-5)
    ours = differences(
        lambda x: (decoupled(x, PROXIMAL, BEHAVIOUR) * WEIGHT).sum(), LOG_PROB
    )
    assert 1 < (ours[MASK] == 0).sum() < MASK.sum()  # rejected, and clipped
    assert_allclose(slope, ours, rtol=1e-4, atol=1e-7)
    for constant in constants:  # d loss / d proximal and d behaviour: exactly 0
        assert_array_equal(constant, np.zeros(MASK.shape))


def test_4_on_policy_it_is_ppo_and_at_the_proximal_policy_the_policy_gradient():
    same_policy = {"proximal": BEHAVIOUR, "behaviour": BEHAVIOUR}
    ours, theirs = (found(objective, **same_policy) for objective in (AREAL, NAIVE))
    assert ours[0] == theirs[0]
    assert_array_equal(ours[1], theirs[1])
    assert_array_equal(ours[2][0], theirs[2][0])
    _, _, (slope, *_) = found(log_prob=PROXIMAL)
    w = np.exp(np.float64(PROXIMAL) - BEHAVIOUR)
    kept = MASK & (w <= 5)
    assert_allclose(slope, np.where(kept, -w * ADVANTAGE / MASK.sum(), 0), rtol=1e-5)


def test_5_nothing_is_clipped_in_the_first_minibatch():
    """However stale: log-probs of the update are those of the proximal policy then."""

    def clipped(proximal):
        ratio = AREAL.log_ratio(jnp.asarray(PROXIMAL), batch_of(proximal, BEHAVIOUR))
        low, high = rl.beyond_clip(ratio, AREAL.clip_range)
        return float(jnp.mean((low | high)[MASK]))

    assert clipped(PROXIMAL) == 0
    assert clipped(BEHAVIOUR) > 0.3  # naive


def test_6_a_shift_of_one_behaviour_scales_one_loss():
    _, each, _ = found()
    shifted = BEHAVIOUR.copy()
    shifted[1, 1] += 0.7
    _, after, _ = found(behaviour=shifted)
    assert each[1, 1] != 0
    assert_allclose(after[1, 1], each[1, 1] * np.exp(-0.7), rtol=1e-5)
    after[1, 1] = each[1, 1]
    assert_array_equal(after, each)
    shifted[1, 1] = BEHAVIOUR[1, 1] - 9  # and beyond the bound it is rejected
    assert found(behaviour=shifted)[1][1, 1] == 0


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
def test_7_masked_tokens_change_nothing(hole):
    given = (LOG_PROB, PROXIMAL, BEHAVIOUR)
    holes = [np.where(MASK, x, np.float32(hole)) for x in given]
    loss, each, slopes = found(AREAL, *holes)
    plain_loss, plain_each, plain_slopes = found(AREAL, *given)
    assert loss == plain_loss
    assert_array_equal(each, plain_each)
    assert_array_equal(slopes[0], plain_slopes[0])


def test_7_rejected_tokens_leave_the_numerator_alone():
    weight = rl.aggregation_weights(MASK, AREAL.aggregation)
    assert_allclose(weight, WEIGHT, rtol=1e-6)  # 1 / 8 each, whoever is rejected
    _, each, (slope, *_) = found()
    assert each[1, 2] == slope[1, 2] == 0
    only = {"correction": "reject", "max_weight": 1e-6, "aggregation": "token-mean"}
    loss, each, _ = found(runtime.GroupRelativeObjective(**only))
    assert loss == 0 and not each.any()


def test_13_on_a_bandit_of_five_symbols_the_gradient_is_that_of_the_proximal_policy():
    """Every symbol as often as the behaviour draws it: no sampling error.

    Five of the live places hold a symbol each; the bound is far away.
    """
    logits, other = RNG.normal(size=(2, 5))
    proximal, behaviour = (x - np.log(np.exp(x).sum()) for x in (logits, other))
    mu, at = np.exp(behaviour), np.nonzero(MASK)
    at = tuple(x[:5] for x in at)

    def spread(x):
        array = np.zeros(MASK.shape, np.float32)
        array[at] = x
        return array

    free = dataclasses.replace(AREAL, max_weight=1e9)
    given = (spread(proximal), spread(proximal), spread(behaviour))
    _, (slope, *_) = graded(free, *given, spread(1) > 0, spread(mu))
    # log-probs -> logits: d log p_a / d logit_b = [a = b] - p_b
    pi, reward = np.exp(proximal), np.float64(ADVANTAGE[at])
    slope = np.asarray(slope)[at]
    expected = -pi * (reward - (pi * reward).sum())  # of -E_pi[reward]
    assert_allclose(slope - pi * slope.sum(), expected, rtol=1e-4, atol=1e-6)
    w = rl.rejecting_weights(*(spread(x) for x in (proximal, behaviour)), high=1e9)
    assert_allclose((spread(mu) * w).sum(), 1, rtol=1e-5)  # E_mu[w]
    assert w.max() > 1.2


def slow_second_moment(squares, threshold):
    """The rule of M2PO by its words: drop the largest until the mean is below."""
    left = list(range(len(squares)))
    while len(left) > 1 and np.mean([squares[i] for i in left]) >= threshold:
        left.remove(max(left, key=lambda i: (squares[i], i)))
    return set(left)


def test_m2po_drops_the_largest_until_the_rest_are_small_on_average():
    rng, seen = np.random.default_rng(3), set()
    for case in range(40):
        mask = rng.random((4, 6)) < (0.8 if case else 0)
        difference = np.float32(rng.normal(0, rng.choice([0.05, 0.2, 2]), (4, 6)))
        if case % 4 == 1:  # ties
            difference = np.sign(difference) * np.float32(0.25)
        target = np.where(mask, difference, rng.choice([np.nan, np.inf, 9]))
        behaviour = np.where(mask, 0, np.nan)
        kept = np.asarray(
            rl.within_second_moment(target, behaviour, mask, threshold=0.04)
        )
        live = np.flatnonzero(mask)
        squares = np.float64(difference.ravel()[live]) ** 2
        expected = live[sorted(slow_second_moment(squares, 0.04))] if len(live) else []
        assert np.flatnonzero(kept).tolist() == list(expected), case
        seen.add(0 if not len(live) else kept.sum() / len(live))
    assert 1 in seen and any(0 < share < 0.2 for share in seen)
    every = np.zeros((4, 6), np.float32)
    assert rl.within_second_moment(every, every, threshold=1e-9).all()
    every[1, 2] = np.nan
    assert (
        rl.within_second_moment(every, every, threshold=1.0) == ~np.isnan(every)
    ).all()


def test_11_the_log_linear_proximal_policy():
    versions = np.array([[5, 4, 2, -1], [0, 5, 6, 3], [1, -1, -1, -1]])
    ours = rl.log_linear_proximal(LOG_PROB, BEHAVIOUR, versions, 5, MASK)
    share = {0: 5 / 6, 1: 4 / 5, 2: 3 / 4, 3: 2 / 3, 4: 1 / 2, 5: 0.0, 6: 0.0, -1: 0.0}
    alpha = np.vectorize(share.get)(versions)
    expected = BEHAVIOUR + alpha * (np.float64(LOG_PROB) - BEHAVIOUR)
    assert_allclose(ours, np.where(MASK, expected, 0), rtol=1e-6, atol=1e-6)
    # v = proximal, version -1, and the future: what was recorded, to the bit
    still = MASK & (alpha == 0)
    assert_array_equal(np.asarray(ours)[still], BEHAVIOUR[still])
    holes = [np.where(MASK, x, np.nan) for x in (LOG_PROB, BEHAVIOUR)]
    assert_array_equal(rl.log_linear_proximal(*holes, versions, 5, MASK), ours)


# A policy without a network: the same logits wherever a token stands.
VOCABULARY, VERSION, KEY = 5, 3, jax.random.key(0)
PARAMS = {"logits": np.float32(RNG.normal(size=VOCABULARY))}
SETTINGS = LanguageSettings(prompts=2, samples=2, max_new_tokens=4, microbatch=2)


def table(params, tokens, positions, segments):
    log_probs = jax.nn.log_softmax(params["logits"])[tokens]
    return log_probs, jnp.zeros_like(log_probs)


def written(*versions):
    rng, records = np.random.default_rng(1), []
    for i, own in enumerate(versions):
        drawn = rng.integers(0, VOCABULARY, len(own)).tolist()
        log_probs = rng.uniform(-2.5, -0.5, len(own)).tolist()
        given = {"prompt": (1, i // 2), "versions": list(own), "status": "stop"}
        given |= {"tokens": drawn, "log_probs": log_probs, "reward": float(i % 2)}
        records.append(TokenRecord(number=i, group=i // 2, **given))
    return records


RECORDS = written([1, 1, 2, 3], [3, 3], [0, 2, 3], [2])


def packed(objective, records=RECORDS, recompute=None, version=VERSION, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    order = np.random.default_rng(0)
    options = {"length": 32, "version": version, "proximal": recompute}
    return runtime.update_batches(records, objective, settings, order, **options)


def test_11_an_update_around_the_log_linear_policy_without_tokens_that_are_too_old(
    refused,
):
    """All that is learned from stale responses, by finite differences in float64."""
    objective = areal.preset("areal", scale="none", max_weight=1.2)
    settings = dataclasses.replace(SETTINGS, proximal="loglinear", max_lag=2)
    make = functools.partial(runtime.make_learner, table, objective, optax.sgd(1.0))
    learner = make(settings, length=32)
    state = learner.init(jax.tree.map(jnp.array, PARAMS))
    state = dataclasses.replace(state, iteration=jnp.int32(VERSION))
    state, metrics = learner.learn(state, RECORDS, KEY)
    assert int(state.iteration) == VERSION + 1

    trained = np.float64(PARAMS["logits"])

    def loss(logits):
        now, start = (x - np.log(np.exp(x).sum()) for x in (logits, trained))
        total, count, seen, weights = 0.0, 0, {"kept": 0, "recent": 0}, []
        for record in RECORDS:
            a = record.reward - 0.5
            for token, b, v in zip(record.tokens, record.log_probs, record.versions):
                count += 1
                alpha = (VERSION - v) / (VERSION + 1 - v)
                proximal = b + alpha * (start[token] - b)
                u, w = np.exp(now[token] - proximal), np.exp(proximal - b)
                if VERSION - v <= 2:
                    seen["recent"] += 1
                    weights.append(w)
                if VERSION - v <= 2 and w <= 1.2:
                    seen["kept"] += 1
                    total += w * max(-a * u, -a * np.clip(u, 0.8, 1.2))
        return total / count, seen, count, np.array(weights)

    value, seen, count, weights = loss(trained)
    assert count == 10 and 0 < seen["kept"] < seen["recent"] == 9
    slope = differences(lambda x: loss(x)[0], trained)
    change = PARAMS["logits"] - np.asarray(state.learner.params["logits"])
    assert np.abs(slope).max() > 1e-3
    assert_allclose(change, slope, rtol=1e-4, atol=1e-6)
    assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert_allclose(metrics["trained_fraction"], seen["recent"] / count, rtol=1e-6)
    # of those that are too old nothing counts
    fraction = weights.sum() ** 2 / (len(weights) * (weights**2).sum())
    assert_allclose(metrics["effective_sample_fraction"], fraction, rtol=1e-5)
    # older responses, far from the policy: none is left to learn from
    far = [dataclasses.replace(r, log_probs=[-9.0] * len(r)) for r in RECORDS]
    for record in far:
        record.versions = [2] * len(record)
    refused("behaviour_weight=0 in 1 updates", learner.learn, state, far, KEY)
    behaviour = dataclasses.replace(settings, proximal="behaviour")
    refused("there is nothing to correct", make, behaviour, length=32)
    question = dataclasses.replace(settings, train_prompt="question")
    refused("train_prompt='question' needs log-probs", make, question, length=32)


def test_tokens_beyond_eta_stay_in_the_denominators(refused):
    for aggregation, shares in (
        ("token-mean", 1 / 10),
        ("seq-mean-token-mean", 1 / (4 * np.array([4, 2, 3, 1]))),
    ):
        objective = areal.preset("areal", aggregation=aggregation)
        given = {"recompute": lambda texts: texts.log_prob}
        (batch,) = packed(objective, max_lag=1, **given)
        own = batch.texts.version[batch.texts.mask]
        assert_array_equal(batch.weight[batch.texts.mask] > 0, own >= 2)
        assert_array_equal(batch.keep[batch.texts.mask], own >= 2)
        each = batch.weight.reshape(4, -1).max(1)
        assert_allclose(sorted(each), sorted(np.broadcast_to(shares, 4)), rtol=1e-6)
        (everything,) = packed(objective, **given)
        assert everything.keep is None and everything.version is None
    versions = np.array([[-1, 0, 1, 2, 3]])  # -1: a prompt, or padding
    recent = jax.jit(rl.within_lag)(versions, 2, 2)
    assert recent.tolist() == [[False, True, True, True, True]]
    assert rl.within_lag(versions, 2, 0).tolist() == [[False] * 3 + [True] * 2]
    old = written([1, 1], [1], [0], [1])
    message = "the newest is of version 1, more than max_lag=1 behind .* version 3"
    refused(message, packed, NAIVE, old, max_lag=1)
    refused("max_lag=1 and .* give version=", packed, NAIVE, version=None, max_lag=1)
    refused("max_lag=-1 is outside", packed, NAIVE, max_lag=-1)


def test_m2po_chooses_among_all_tokens_of_an_iteration():
    """The same tokens however they are cut into minibatches and microbatches."""

    def away(texts):
        return texts.log_prob + 0.4 * (texts.version - 2) * texts.mask

    # squares by version: 0.64 (once), 0.16 (twice), 0 (thrice), 0.16 (four times)
    for threshold, oldest in ((0.3, 0), (0.12, 1)):  # of means 1.6 / 10, 0.96 / 9
        objective = areal.preset("m2po", max_second_moment=threshold)
        for changes in ({}, {"minibatches": 2}, {"microbatch": 4}, {"microbatch": 1}):
            seen = []
            for batch in packed(objective, recompute=away, **changes):
                version = batch.texts.version[batch.texts.mask]
                seen += version.tolist()
                assert_array_equal(batch.keep[batch.texts.mask], version >= oldest)
                weight = 1 / batch.texts.mask.sum()  # those left out count
                assert_allclose(batch.weight[batch.keep], weight, rtol=1e-6)
                assert not batch.weight[~batch.keep].any()
            assert sorted(seen) == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]


def test_what_no_token_survives_is_an_error(refused):
    check = runtime.update.check_something_trains
    check([{"behaviour_weight": 0.0}, {"behaviour_weight": 0.2}])
    check([{"loss": 0.0}])
    refused("behaviour_weight=0 in 2 updates", check, 2 * [{"behaviour_weight": 0.0}])


def test_recipes():
    assert (AREAL.correction, AREAL.max_weight) == ("reject", 5.0)
    assert areal.preset("gsm8k").clip_range == 0.4
    assert areal.preset("m2po").max_second_moment == 0.04
    for name, eta, sequences in (("areal", 16, 2048), ("gsm8k", 2, 1024)):
        schedule = areal.schedule(name, updates=10)
        assert schedule.eta == eta and schedule.batch * schedule.samples == sequences
    assert areal.accept([0] * 8 + [1] * 8) and areal.accept([0.1] * 4)
    assert not areal.accept([1] * 16) and not areal.accept([0] * 16)
    schedule = areal.schedule("gsm8k", updates=1, batch=4, slots=8)
    settings = areal.settings(schedule, AREAL, proximal="loglinear", minibatches=2)
    assert (settings.prompts, settings.samples, settings.minibatches) == (4, 4, 2)
    assert settings.max_lag == math.inf and settings.max_new_tokens == 1024


def test_section_7_what_makes_no_sense_is_refused_before_anything_compiles(refused):
    schedule = functools.partial(areal.schedule, "gsm8k", updates=3)
    refused("eta=-1 is outside", schedule, eta=-1)
    refused("batch=0 must be at least 1", schedule, batch=0)
    refused("Did you mean 'gsm8k'", areal.schedule, "gsm8", updates=3)
    message = "when_full='resume': in AReaL generators never stop"
    refused(message, schedule, when_full="resume", ahead=512)
    refused("ahead=512: .* eta alone", schedule, ahead=512)
    refused("surrogate='sapo'", areal.preset, "areal", surrogate="sapo")
    assert areal.preset("naive", surrogate="sapo").correction == "none"
    refused("Did you mean 'areal'", areal.preset, "arael")
    settings = functools.partial(areal.settings, schedule())
    refused("proximal='behaviour' makes", settings, AREAL, proximal="behaviour")
    refused("samples=5, but the schedule has 4", settings, AREAL, samples=5)
    with pytest.warns(UserWarning, match="'recompute' with correction='none'"):
        settings(NAIVE, proximal="recompute")
    settings(areal.preset("m2po", correction="none"), proximal="recompute")
    areal.settings(schedule(eta=0), NAIVE, proximal="recompute")  # on policy
    refused("high=1.5 is outside", areal.accept, [1.0], high=1.5)
    refused("number of scores=0", areal.accept, [])
    for message, changes in (
        ("reject_by='k3' has no meaning for correction='truncate'",
         {"correction": "truncate", "reject_by": "k3"}),
        ("reject_over='max' has no meaning", {"correction": "none", "reject_over": "max"}),
        ("min_weight=5.0 is outside", {"min_weight": 5.0}),
        ("min_weight=-1.0 is outside", {"min_weight": -1.0}),
        ("max_second_moment=0.0", {"max_second_moment": 0.0}),
        ("reject_by='k4' is not one of", {"reject_by": "k4"}),
    ):  # fmt: skip
        refused(message, areal.preset, "areal", **changes)
    check = runtime.packing.check_log_linear
    given = dataclasses.replace(SETTINGS, proximal="loglinear")
    check(AREAL, given)
    check(areal.preset("m2po"), SETTINGS)
    refused("max_second_moment needs", check, areal.preset("m2po"), given)
    question = dataclasses.replace(given, train_prompt="question")
    refused("train_prompt='question' needs", check, AREAL, question)
    calibrated = areal.preset("areal", calibrate_every=2)
    refused("calibrate_every needs", check, calibrated, given)


def test_sequences_are_rejected_by_an_estimate_of_the_kl():
    """Of KL(behaviour || proximal), over a response: AReaL's sequence level."""
    difference = np.where(MASK, np.float64(PROXIMAL) - BEHAVIOUR, 0)
    estimates = np.exp(difference) - 1 - difference  # 0 where masked
    mean = estimates.sum(1) / MASK.sum(1)
    bound = float(np.sort(mean)[1] * 1.01)
    given = {"correction": "reject", "reject_by": "k3", "reject_over": "mean"}
    objective = runtime.GroupRelativeObjective(max_weight=bound, **given)
    _, metrics = objective.loss(jnp.asarray(LOG_PROB), batch_of(PROXIMAL, BEHAVIOUR))
    kept = MASK & (mean <= bound)[:, None]
    assert 0 < kept.sum() < MASK.sum()
    expected = np.where(kept, np.exp(difference), 0)
    assert_allclose(metrics["behaviour_weight"], expected, rtol=1e-5)


def test_the_schedule_says_which_tokens_train():
    schedule = Schedule(batch=2, samples=2, max_new_tokens=4, updates=1, eta=2)
    settings = functools.partial(areal.settings, objective=AREAL, microbatch=4)
    assert settings(schedule).max_lag == schedule.max_lag == math.inf
    assert settings(dataclasses.replace(schedule, on_stale="mask")).max_lag == 2
