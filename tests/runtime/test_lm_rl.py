"""The synchronous iteration: what it learns, and that its layout changes nothing."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import same
from numpy.testing import assert_allclose

from tmdjax import models, quant, rl, runtime
from tmdjax.generation import Engine, EngineConfig, Sampling, cached_decoder
from tmdjax.rewards.host import RewardError
from tmdjax.runtime import LanguageSettings, LMState, Prompt
from tmdjax.systems import grpo

KEY = jax.random.key(0)
CONFIG = models.DecoderConfig(
    vocab_size=11, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=8, sliding_window=4,
)  # fmt: skip
DECODER = models.Decoder(CONFIG)
APPLY = models.functional(DECODER)
PARAMS = models.init_params(DECODER, KEY, jax.ShapeDtypeStruct((1, 4), jnp.int32))
STOP, LENGTH = 10, 32
SETTINGS = LanguageSettings(prompts=4, samples=4, max_new_tokens=6, microbatch=8)
CONFIGURED = EngineConfig(slots=8, length=LENGTH, steps=3, stop=(STOP,))


def log_probs(params, tokens, positions, segments):
    logits = APPLY(params, tokens, positions, segments)
    return models.token_log_probs(logits, tokens), models.token_entropies(logits)


def draw(iteration, attempt):
    rng = np.random.default_rng([iteration, attempt])
    return [
        Prompt(rng.integers(0, 9, 2 + i % 2).tolist(), int(rng.integers(3)))
        for i in range(SETTINGS.prompts)
    ]


def sevens(problem, tokens):
    """The share of sevens; the response should be nothing else."""
    return float(np.mean([token == 7 for token in tokens]))


OBJECTIVE = grpo.preset("grpo")
ENGINE = Engine(cached_decoder(CONFIG), PARAMS, CONFIGURED, KEY)
TWICE = {"epochs": 2, "minibatches": 2}
PACKED, NOT_PACKED = ({"microbatch": 8, "pack_rows": rows} for rows in (3, 1))
LAYOUTS = [("gspo", PACKED), ("dapo", NOT_PACKED)]  # what cannot be packed is not
LAYOUTS += [
    pytest.param(name, changes, marks=pytest.mark.slow)
    for name in ("grpo", "dapo", "gspo", "rloo")
    for changes in (PACKED, {"microbatch": 4})
]


def engine():
    """The one of all tests, as if it were new: its version alone goes on."""
    ENGINE.abort()
    ENGINE.update_weights(PARAMS, ENGINE.version + 1)
    return ENGINE


def made(objective, optimizer, settings, network=log_probs, engine=ENGINE, **options):
    given = (engine, network, objective, optimizer, settings, draw, sevens)
    return runtime.make_iteration(*given, **{"length": LENGTH, **options})


@functools.cache
def iteration(objective, settings):
    optimizer = optax.adam(1e-2)
    return made(objective, optimizer, settings), optimizer


def run(iterations, state=None, objective=OBJECTIVE, **changes):
    iterate, optimizer = iteration(objective, dataclasses.replace(SETTINGS, **changes))
    engine()
    state = state or LMState.start(PARAMS, optimizer)
    found = []
    for _ in range(iterations):
        state, metrics = iterate(state, None, KEY)
        found.append(metrics)
    return state, found


def test_it_learns_what_is_rewarded():
    state, found = run(25, **TWICE)
    scores = [m["score"] for m in found]
    assert np.mean(scores[:3]) < 0.3 and np.mean(scores[-3:]) > 0.8
    assert max(m["first_ratio_error"] for m in found) < 1e-4
    assert found[0]["tied_group_fraction"] < 1 and found[0]["entropy"] > 1
    assert found[0]["behaviour_kl"] < 1e-6 and state.skipped == 0
    assert found[0]["effective_sample_fraction"] == pytest.approx(1, abs=1e-6)
    for m in found:  # 8: of the first minibatch, before any update
        assert 0 <= m["mismatch_kl"] < 1e-9 and m["mismatch_max"] < 1e-4
        assert 0 < m["mismatch_mean"] < m["mismatch_max"]
    assert "quantised_moved" not in found[0]
    assert all(m["staleness_max"] == 0 for m in found)


def test_killed_and_resumed_is_the_same_run():
    whole, metrics = run(3, **TWICE)
    part, _ = run(2, **TWICE)
    # a new process: arrays from a checkpoint, and an engine of another past
    part = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), part)
    resumed, rest = run(1, state=part, **TWICE)
    same(whole, resumed)
    assert metrics[2] == rest[0]


@functools.cache
def written():
    return runtime.collect(engine(), draw, sevens, SETTINGS, 0)


@functools.cache
def descent(objective):
    return runtime.make_update(log_probs, objective, optax.sgd(1.0))


def first_batch(objective, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    given = (written().records, objective, settings, np.random.default_rng(0))
    (batch,) = runtime.update_batches(*given, length=LENGTH)
    return batch


def gradients(objective, **changes):
    """Of the first minibatch: the change of parameters by plain descent."""
    state = LMState.start(PARAMS, optax.sgd(1.0)).learner
    state, metrics = descent(objective)(state, first_batch(objective, **changes), KEY)
    change = jax.tree.map(lambda a, b: np.asarray(a) - b, PARAMS, state.params)
    return change, rl.mismatch_of(metrics)


@pytest.mark.parametrize("name, changes", LAYOUTS)
def test_c_packing_and_microbatches_change_nothing(name, changes):
    objective = grpo.preset(name)
    whole, metrics = gradients(objective, microbatch=16)
    other, others = gradients(objective, **changes)
    same((whole, metrics), (other, others), atol=2e-6)


def test_groups_of_unequal_size_and_parts_that_are_not_full():
    """13 responses of 4 groups, two minibatches, microbatches of 4: 3 are padding."""
    records = [r for i, r in enumerate(written().records) if i not in (1, 2, 6)]
    settings = dataclasses.replace(SETTINGS, minibatches=2, microbatch=4)
    given = (records, OBJECTIVE, settings, np.random.default_rng(0))
    batches = list(runtime.update_batches(*given, length=LENGTH))
    assert [batch.advantage.shape for batch in batches] == [(2, 4), (2, 4)]
    found = [batch.texts.mask.any(-1) for batch in batches]
    assert [live.sum() for live in found] == [7, 6]
    for batch, live in zip(batches, found):
        assert (batch.advantage[~live] == 0).all() and (batch.weight[~live] == 0).all()
        assert_allclose(batch.weight.sum(), 1, rtol=1e-6)
        assert batch.share[0] == pytest.approx(1 / batch.texts.mask.sum())
    for g in range(4):
        own = [b.advantage[(b.texts.group == g) & x] for b, x in zip(batches, found)]
        assert_allclose(np.concatenate(own).mean(), 0, atol=1e-6)


def test_records_that_cannot_be_learned_from(refused):
    records = written().records
    settings = dataclasses.replace(SETTINGS, minibatches=4, microbatch=4)

    def batches(records):
        order = np.random.default_rng(0)
        given = (records, OBJECTIVE, settings, order)
        return runtime.update_batches(*given, length=LENGTH)

    refused("3 responses do not fill minibatches=4", batches, records[:3])
    mixed = [dataclasses.replace(record, group=0) for record in records]
    refused("group 0 holds responses to several prompts", batches, mixed)
    unscored = [*records[:4], dataclasses.replace(records[4], reward=None)]
    refused("has reward None; score it first", batches, unscored)


def test_a_scorer_that_fails_or_hangs_stops_the_iteration(refused):
    def collected(score, **changes):
        settings = dataclasses.replace(SETTINGS, **changes)
        return runtime.collect(engine(), draw, score, settings, 0)

    def hangs(problem, tokens):
        time.sleep(5)

    error = RewardError
    refused("the scorer raised on sample", collected, lambda *_: 1 / 0, error=error)
    refused(
        "did not answer within 0.1 s", collected, hangs, score_timeout=0.1, error=error
    )
    refused("nan", collected, lambda *_: float("nan"), error=error)


@pytest.mark.slow
def test_the_loss_is_that_of_the_definition():
    """Token mean of -A at ratio 1: the gradient of log-probs, text by text."""
    found, _ = gradients(grpo.preset("dapo"), microbatch=16)
    records = written().records
    groups = np.array([r.reward for r in records]).reshape(4, 4)
    std = groups.std(1, ddof=1, keepdims=True)
    centred = groups - groups.mean(1, keepdims=True)
    advantage = np.where(std > 1e-6, centred / (std + 1e-6), 0)
    count = sum(map(len, records))

    def expected(params):
        total = 0.0
        for record, a in zip(records, advantage.reshape(-1)):
            text = jnp.asarray([[*record.prompt, *record.tokens]])
            each = models.token_log_probs(APPLY(params, text), text)[0]
            total -= float(a) * each[len(record.prompt) :].sum()
        return total / count

    same(found, jax.grad(expected)(PARAMS), atol=1e-5)


def test_clipped_shares_are_those_of_the_ratio_that_is_clipped():
    """The mean over a sequence moves far less than a token's ratio."""
    _, found = run(1, objective=grpo.preset("gspo"), **TWICE)
    _, tokens = run(1, objective=grpo.preset("grpo", clip_range=(3e-4, 4e-4)), **TWICE)
    assert found[0]["first_ratio_error"] < 1e-5
    assert found[0]["ratio_error_max"] < tokens[0]["ratio_error_max"]
    # means over four updates, of which the first one's ratios are 1
    for m in (found[0], tokens[0]):
        assert 0 < m["clip_fraction_low"] + m["clip_fraction_high"] <= 0.75


def test_c_truncated_responses_may_be_left_out():
    """They do not train, but count in their groups and in the denominator."""
    rollout = written()
    cut = [r.status == "length" for r in rollout.records]
    assert any(cut) and not all(cut)
    batch = first_batch(grpo.preset("dapo"), mask_truncated=True)
    live = batch.weight.reshape(16, -1) > 0
    assert (~live.any(1)).sum() == sum(cut)
    assert_allclose(batch.weight[batch.weight > 0], batch.share[0])
    assert batch.share[0] == pytest.approx(1 / sum(map(len, rollout.records)))


def test_recomputed_log_probs_and_a_reference(refused):
    options = {"kl_coefficient": 0.1, "correction": "truncate", "clip_range": 0.3}
    objective, optimizer = runtime.GroupRelativeObjective(**options), optax.sgd(0.0)
    settings = dataclasses.replace(SETTINGS, proximal="recompute")
    other = jax.tree.map(lambda x: x * 1.1, PARAMS)
    iterate = made(objective, optimizer, settings, reference=other)
    engine()
    _, metrics = iterate(LMState.start(PARAMS, optimizer), None, KEY)
    assert metrics["kl"] > 1e-5
    assert metrics["behaviour_weight"] == pytest.approx(1, abs=1e-4)
    assert 0 < metrics["behaviour_log_ratio_max"] < 1e-4
    uncorrected = dataclasses.replace(objective, correction="none")
    refused("needs a reference policy", run, 1, objective=uncorrected)
    behaviour = {"objective": objective, "proximal": "behaviour"}
    refused("there is nothing to correct", run, 1, **behaviour)


def test_engine_and_update_in_two_precisions(refused):
    """The records keep the engine's log-probs; ratios to recomputed ones start at 1."""
    pair = quant.Precision(rollout="bf16", train="fp32")
    narrow = models.with_recipe(CONFIG, pair.rollout)
    other = Engine(cached_decoder(narrow), PARAMS, CONFIGURED, KEY)
    given = {"engine": other, "precision": pair}
    objective = grpo.preset("decoupled", clip_range=1e-3, correction="truncate")
    corrected = dataclasses.replace(SETTINGS, proximal="recompute")
    optimizer = optax.sgd(0.1)
    iterate = made(objective, optimizer, corrected, **given)
    state, metrics = iterate(LMState.start(PARAMS, optimizer), None, KEY)
    assert metrics["first_ratio_error"] < 1e-5 and state.skipped == 0
    assert metrics["behaviour_log_ratio_max"] > 1e-4
    assert 0 < metrics["behaviour_kl"] < 1e-3
    assert metrics["mismatch_kl"] == pytest.approx(metrics["behaviour_kl"], rel=1e-5)
    assert metrics["mismatch_max"] == metrics["behaviour_log_ratio_max"]
    assert abs(metrics["behaviour_weight"] - 1) < 1e-3
    uncorrected = dataclasses.replace(objective, correction="none")
    behaviour = dataclasses.replace(SETTINGS, proximal="behaviour")
    iterate = made(uncorrected, optimizer, behaviour, **given)
    start = LMState.start(PARAMS, optimizer)
    message = "rollout='bf16' and updates under precision.train='fp32'"
    refused(message, iterate, start, None, KEY, error=rl.RatioError)
    iterate = made(uncorrected, optimizer, behaviour, engine=other)
    with pytest.raises(rl.RatioError) as raised:
        iterate(LMState.start(PARAMS, optimizer), None, KEY)
    said = str(raised.value)
    assert "LanguageSettings(proximal='recompute')" in said and "recipe='fp32'" in said
    assert "guidance" not in said and "times" not in said
    # the defaults fit together: nothing is said of precision, or of the proximal policy
    iterate = made(uncorrected, optimizer, SETTINGS, engine=other)
    _, metrics = iterate(LMState.start(PARAMS, optimizer), None, KEY)
    assert metrics["first_ratio_error"] < 1e-5
    assert metrics["behaviour_log_ratio_max"] > 1e-4


def test_the_default_proximal_policy_follows_from_recipes_and_objective():
    for recipe, head, exact in (
        ("fp32", None, True), ("bf16", None, False), ("fp32", "bf16", False),
    ):  # fmt: skip
        config = dataclasses.replace(CONFIG, recipe=recipe, head_recipe=head)
        assert cached_decoder(config).exact is exact, (recipe, head)
    assert not cached_decoder(CONFIG, jnp.bfloat16).exact
    # a correction takes log-probs of before the update, without a word of the user's
    _, (metrics,) = run(1, objective=grpo.preset("decoupled"))
    assert 0 < metrics["behaviour_log_ratio_max"] < 1e-4


def test_the_constant_length_is_that_of_the_iteration():
    batch = first_batch(grpo.preset("dr_grpo"), microbatch=16)
    assert_allclose(batch.weight[batch.texts.mask], 1 / (16 * SETTINGS.max_new_tokens))


def test_d_dynamic_sampling_replaces_tied_groups(refused):
    sometimes = lambda *given: sevens(*given) if given[0] else 1.0  # noqa: E731

    def problems(iteration, attempt):
        return [Prompt((3, i), attempt > 0 and i > 0) for i in range(4)]

    settings = dataclasses.replace(SETTINGS, dynamic_sampling=True, samples=8)
    found = runtime.collect(engine(), problems, sometimes, settings, 0)
    assert all(found.problems) and len(found.records) == 32
    assert [r.group for r in found.records] == np.repeat(range(4), 8).tolist()
    assert found.metrics["groups_left_out"] >= 5
    few = dataclasses.replace(settings, max_attempts=3)
    given = (engine(), problems, lambda problem, tokens: 1.0, few, 0)
    message = r"after max_attempts=3 .* only 0 groups"
    refused(message, runtime.collect, *given, error=RuntimeError)


def test_d_dynamic_sampling_goes_by_scores_and_not_by_penalties(refused):
    """Wrong responses of unequal length have unequal rewards, and teach nothing."""
    penalty = {"overlong_buffer": 6, "overlong_factor": 0.5, "dynamic_sampling": True}
    settings = dataclasses.replace(SETTINGS, max_attempts=2, **penalty)
    given = (engine(), draw, lambda problem, tokens: 0.0, settings, 0)
    message = "only 0 groups have scores that differ"
    refused(message, runtime.collect, *given, error=RuntimeError)
    other = dataclasses.replace(settings, dynamic_sampling=False)
    found = runtime.collect(engine(), draw, lambda *_: 0.0, other, 0)
    assert len({record.reward for record in found.records}) > 1
    assert found.metrics["tied_group_fraction"] == 1


def test_d_long_responses_are_penalised():
    settings = dataclasses.replace(SETTINGS, overlong_buffer=4, overlong_factor=0.5)
    found = runtime.collect(engine(), draw, lambda problem, tokens: 1.0, settings, 0)
    for record in found.records:
        assert record.reward == 1 - 0.5 * max(0, len(record) - 2) / 4


def test_another_policy_than_the_engines_is_seen(refused):
    wrong = lambda *given: tuple(2 * x for x in log_probs(*given))  # noqa: E731
    engine()
    iterate = made(OBJECTIVE, optax.sgd(0.1), SETTINGS, wrong)
    given = (LMState.start(PARAMS, optax.sgd(0.1)), None, KEY)
    refused("on the first minibatch", iterate, *given, error=rl.RatioError)


def test_bad_settings_and_engines_that_cannot_train(refused):
    changed = functools.partial(dataclasses.replace, SETTINGS)
    refused("samples=1", changed, samples=1)
    refused("16 responses do not divide into minibatches=3", changed, minibatches=3)
    refused("16 responses a minibatch do not divide", changed, microbatch=3)
    refused("proximal='old'", changed, proximal="old")
    refused("overlong_buffer=7", changed, overlong_buffer=7)
    refused("score_timeout=inf", changed, score_timeout=float("inf"))
    make = functools.partial(made, OBJECTIVE, optax.sgd(0.1), SETTINGS)
    refused("length=33 is above the 32", make, length=33)
    config = dataclasses.replace(CONFIGURED, sampling=Sampling(top_k=3))
    other = Engine(cached_decoder(CONFIG), PARAMS, config, KEY)
    refused("every token to keep a probability", make, engine=other)
