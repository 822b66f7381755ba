"""APRIL's rounds; the numbers are those of the invariants of its sheet.

1 to 5, 8, 11 and 12 hold of the controller: tests/runtime/test_controller.py.
"""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from simulated_runs import SLOTS, lognormal, run

from tmdjax import runtime
from tmdjax.rl import TokenRecord
from tmdjax.runtime import LanguageSettings, Prompt, Schedule, TrajectoryStore
from tmdjax.runtime.lengths import length_bias, mean_length
from tmdjax.systems import april, xrpo

SIZES = {"samples": 2, "max_new_tokens": 400, "updates": 8, "slots": SLOTS}
OTHER_PROMPTS = {"prompt_of": lambda n: Prompt([1, n], n)}


def rounds(target=4, over_provisioned=12, **options):
    return april.schedule(target, over_provisioned, **SIZES | options)


def token(number, place):
    """What a sampler that is keyed by request and place draws from a frozen policy."""
    return (number * 7919 + place * 104729) % 997


class KeyedEngine(runtime.SimulatedEngine):
    """Its tokens are these."""

    def advance(self):
        known = {r.number: len(r) for r in (*self._active, *self._queue)}
        ended = super().advance()
        for r in (*self._active, *ended):
            new = range(known[r.number], len(r))
            r.tokens[new.start :] = [token(r.number, place) for place in new]
        return ended


def told(batches):
    """Of each response that trained, all but how often it was resumed."""
    return [
        (b.version, r.number, r.tokens, r.versions, r.status, r.score, r.reward)
        for b in batches
        for g in b.groups
        for r in g.records
    ]


def test_6_10_what_was_interrupted_is_what_would_have_come_at_once():
    """Its cap counts all its segments, and it is judged once."""
    judged, lengths, cap = collections.Counter(), lognormal(1.0, 3), 40

    def judge(record, problem):
        judged[record.number] += 1
        return float(sum(record.tokens) % 5), float(record.status == "length")

    given = {"lengths": lengths, "engines": KeyedEngine, "judge": judge}
    found = run(rounds(max_new_tokens=cap), **given, **OTHER_PROMPTS)
    assert set(judged.values()) == {1}
    plain = Schedule(batch=4, **SIZES | {"max_new_tokens": cap, "updates": 12})
    sync = {r.number: r for r in run(plain, **given).records}
    for r in found.records:
        length = lengths(r.number)
        assert r.tokens == [token(r.number, i) for i in range(min(length, cap))]
        assert r.status == ("length" if length > cap else "stop")
        alone = sync[r.number]
        assert (r.tokens, r.status) == (alone.tokens, alone.status)
        assert (r.score, r.reward) == (alone.score, alone.reward)
    resumed = [r.status for r in found.records if len(set(r.versions)) > 1]
    assert set(resumed) == {"stop", "length"}
    for batch in found.batches:
        versions = [v for g in batch.groups for r in g.records for v in r.versions]
        share = np.mean(np.array(versions) < batch.version)
        assert april.off_policy_share(batch) == pytest.approx(share)


def test_7_trained_lengths_become_those_of_all_prompts_unless_they_are_discarded():
    """By the distance of Kolmogorov and Smirnov, at 5 %."""
    until = np.arange(1, 401)
    at_most = [0.5 * (1 + math.erf((math.log(n + 1) - 3) / 2**0.5)) for n in until]
    at_most[-1] = 1.0  # lengths are cut there
    mean = 1 + np.sum(1 - np.array(at_most))

    def trained(**options):
        schedule = rounds(2, 6, updates=200, **options)
        given = {"lengths": lognormal(1.0, 7), "steps": 16, "learn_cost": 0.0}
        found = run(schedule, **given, **OTHER_PROMPTS)
        lengths = np.array([len(r) for r in found.records])
        share = np.searchsorted(np.sort(lengths), until, side="right") / len(lengths)
        distance = np.max(np.abs(share - at_most)) * len(lengths) ** 0.5
        return lengths, distance, length_bias(found.store.select())

    kept, kept_distance, kept_bias = trained()
    thrown, thrown_distance, thrown_bias = trained(recycle=False)
    assert len(kept) == len(thrown) == 200 * 2 * 2
    assert kept_distance < 1.36 < thrown_distance
    assert thrown.mean() < 0.85 * mean and abs(kept.mean() / mean - 1) < 0.07
    assert kept[:20].mean() < 0.95 * mean  # a few rounds are biased all the same
    # what a run can tell of itself, without the distribution
    assert thrown_bias["length_trained"] == thrown.mean()
    assert (
        thrown_bias["length_ratio"] < 0.9 and abs(kept_bias["length_ratio"] - 1) < 0.05
    )
    assert abs(kept_bias["length_all"] / mean - 1) < 0.07


def test_mean_length_takes_a_stopped_response_for_one_of_those_that_came_as_far():
    lengths = np.array([1, 2, 3, 3])
    assert mean_length(lengths, np.ones(4, bool)) == pytest.approx(9 / 4)
    stopped = np.array([True, False, True, True])  # it would have come to 3
    assert mean_length(lengths, stopped) == pytest.approx(10 / 4)
    with pytest.raises(ValueError, match="none of 0 responses was trained on"):
        length_bias([])


VOCAB = 7
OLD = {0: 2, 1: 0, 2: 3, 3: 1}  # tokens of version 0, by response


def records(moved=False):
    """Two groups of two, of versions 0 and 1; ``moved``: old tokens are in the prompt."""
    found = []
    for number, old in OLD.items():
        rng = np.random.default_rng(number)
        tokens = rng.integers(0, VOCAB, 5).tolist()
        log_probs = rng.normal(-1.5, 0.5, 5).tolist()
        record = TokenRecord(
            number=number,
            group=number // 2,
            prompt=(1, 2),
            tokens=tokens,
            log_probs=log_probs,
            versions=[0] * old + [1] * (5 - old),
            status="stop",
            score=float(number % 2),
            reward=float(number % 2),
        )
        if moved:
            record.question, record.prompt = record.prompt, (1, 2, *tokens[:old])
            for values in (record.tokens, record.log_probs, record.versions):
                del values[:old]
        found.append(record)
    return found


def log_probs(params, texts):
    """Of a policy that sees the token before, as a table [vocab, vocab]."""
    tokens = texts.tokens
    following = jax.nn.log_softmax(params)[tokens[:, :-1], tokens[:, 1:]]
    found = texts.responses(jnp.pad(following, ((0, 0), (1, 0))))
    return jnp.where(texts.mask, found, 0)


@functools.partial(jax.jit, static_argnums=0)
def graded(objective, params, batch):
    def loss(params):
        each, _ = objective.loss(log_probs(params, batch.texts), batch)
        return jnp.sum(jnp.where(batch.weight > 0, each, 0) * batch.weight)

    return jax.value_and_grad(loss)(params)


PARAMS = np.float32(np.random.default_rng(4).normal(size=(VOCAB, VOCAB)))


def update(objective, given, recomputed=None, **settings):
    """Loss and gradient of the one minibatch of an update at version 1."""
    sizes = {"prompts": 2, "samples": 2, "max_new_tokens": 8, "microbatch": 4}
    (batch,) = runtime.update_batches(
        given,
        objective,
        LanguageSettings(**sizes, **settings),
        np.random.default_rng(0),
        length=16,
        version=1,
        proximal=recomputed,
    )
    return graded(objective, PARAMS, jax.tree.map(lambda x: x[0], batch))


def test_9_masked_tokens_are_a_part_of_the_prompt():
    """Under a sum over tokens: a mean would still count those that are masked."""
    schedule = rounds(2, off_policy="mask")
    settings = april.settings(schedule, "mask", proximal="behaviour", microbatch=4)
    assert (settings.max_lag, settings.prompts) == (0, 2)
    objective = april.preset("mask", aggregation="seq-mean-token-sum")
    own = {"proximal": "behaviour"}
    loss, slope = update(objective, records(), max_lag=settings.max_lag, **own)
    expected = update(objective, records(moved=True), **own)
    assert_allclose(loss, expected[0], rtol=1e-6)
    assert_allclose(slope, expected[1], rtol=1e-5, atol=1e-7)
    everything = update(objective, records(), **own)[1]
    assert np.max(np.abs(everything - slope)) > 0.01


def test_9_decoupled_without_learning_is_on_policy_and_ignore_asks_for_no_behaviour():
    def as_recorded(texts):  # recomputed by the weights that wrote, it is the same
        return texts.log_prob

    def recomputed(texts):
        return jax.vmap(functools.partial(log_probs, PARAMS))(texts)

    ignore, decoupled = april.preset("april"), april.preset("decoupled")
    on_policy = update(ignore, records(), proximal="behaviour")
    found = update(decoupled, records(), as_recorded, proximal="recompute")
    assert_array_equal(found[0], on_policy[0])
    assert_array_equal(found[1], on_policy[1])
    ignored = update(ignore, records(), recomputed, proximal="recompute")
    other = records()
    for r in other:
        r.log_probs = [x - 1.0 for x in r.log_probs]
    again = update(ignore, other, recomputed, proximal="recompute")
    assert_array_equal(again[1], ignored[1])
    weighed = [
        update(decoupled, each, recomputed, proximal="recompute")[1]
        for each in (records(), other)
    ]
    assert np.max(np.abs(weighed[0] - ignored[1])) > 0.01
    assert np.max(np.abs(weighed[0] - weighed[1])) > 0.01


class Killed(BaseException):
    pass


def restored(schedule, version, folder, **given):
    """A run that is killed while that version trains, and goes on from it."""

    def learned(batch):
        if batch.version == version:
            raise Killed

    with TrajectoryStore(folder) as store:
        with pytest.raises(Killed):
            run(schedule, store=store, learned=learned, **given)
        store.restore(version)
        assert store.counts()["running"] > 0
        return run(schedule, store=store, version=version, **given)


@pytest.mark.parametrize("on_exceed", ["truncate", "first"])
def test_13_restored_with_unfinished_groups_the_batches_are_the_same(
    on_exceed, tmp_path
):
    options = {"max_resume": 2, "on_exceed": on_exceed, "priority": "longest"}
    schedule = rounds(updates=7, off_policy="mask", max_waiting=6, **options)
    given = {"lengths": lognormal(1.0, 4), "engines": KeyedEngine, "steps": 16}
    given |= OTHER_PROMPTS
    whole = run(schedule, **given)
    for version in (2, 5):
        rest = restored(schedule, version, tmp_path / str(version), **given)
        assert told(rest.batches) == told(whole.batches[version:])


def right(record, problem):
    """Never, now and then, or always, by the prompt."""
    drawn = np.random.default_rng([8, record.number]).random()
    return float(drawn < record.group % 5 / 4), 1.0


XRPO = xrpo.preset("xrpo", rounds=3, first_samples=2, examples=0)
PLANNED = {"samples": 5, "rounds": 3, "most_samples": 20}


def test_a_planner_asks_in_rounds_while_others_are_written(tmp_path):
    """XRPO's allocation: more responses to prompts that are right now and then."""

    schedule = rounds(4, 12, updates=6, **PLANNED)
    given = {"lengths": lognormal(1.0, 5), "engines": KeyedEngine, "steps": 16}
    given |= {"judge": right, "planner": XRPO} | OTHER_PROMPTS
    whole = run(schedule, **given)
    assert len(whole.batches) == 6 and whole.worst_lag > 0
    trained = collections.defaultdict(lambda: [[], [], []])
    for r in sorted(whole.records, key=lambda r: r.number):
        group, place = divmod(r.number, 3 * 20)
        assert group == r.group and len(r) == lognormal(1.0, 5)(r.number)
        trained[group][place // 20].append(r)
    asked = collections.Counter(t.group for t in whole.store.select())
    seen, prompts = 0, [Prompt([1, n], n) for n in range(100)]
    for cohort in range(max(trained) // 4):
        groups = range(4 * cohort, 4 * cohort + 4)
        if not trained.keys() >= set(groups):
            continue
        seen += 1
        assert sum(asked[g] for g in groups) == 4 * 5
        assert all(len(trained[g][0]) == 2 for g in groups)
        for number in (1, 2):
            before = [
                runtime.Group(g, [r for part in trained[g][:number] for r in part])
                for g in groups
            ]
            own = [prompts[g] for g in groups]
            turn = runtime.Turn(
                number, cohort, own, before, 5, 2, np.zeros(0, np.uint8)
            )
            counts = [ask.count for ask in XRPO.plan(turn)[0]]
            assert counts == [len(trained[g][number]) for g in groups]
    assert seen > 1 and len({asked[g] for g in trained}) > 2
    for version in (2, 4):
        rest = restored(schedule, version, tmp_path / str(version), **given)
        assert told(rest.batches) == told(whole.batches[version:])

    def lossy(record, problem):
        scored, reward = right(record, problem)
        return scored if record.number % 4 or record.group % 3 else math.nan, reward

    given |= {"judge": lossy, "least_scored": 2}
    whole = run(schedule, **given)
    gone = whole.store.select(["discarded"])
    assert "too few responses could be scored" in {t.reason for t in gone}
    assert min(len(g.records) for b in whole.batches for g in b.groups) >= 2
    rest = restored(schedule, 3, tmp_path / "lossy", **given)
    assert told(rest.batches) == told(whole.batches[3:])


def test_bad_input(refused):
    refused("over_provisioned=0 must be at least 1", rounds, 4, 0)
    with pytest.warns(UserWarning, match="over_provisioned=3 is below target=4"):
        assert rounds(4, 3).most_ahead == 4
    with pytest.warns(UserWarning, match="slots=1 of a generator are fewer"):
        rounds(slots=1)
    refused("ahead follows from over_provisioned", rounds, ahead=9, error=TypeError)
    refused("Schedule has no setting 'max_resum'", rounds, max_resum=2, error=TypeError)
    refused("'masked' is not one of .*Did you mean 'mask'", rounds, off_policy="masked")
    message = "schedule has on_stale='drop'; make both under one rule"
    refused(message, april.settings, rounds(), "mask")
    message = "proximal='behaviour' with off_policy='ignore'"
    refused(message, april.settings, rounds(), proximal="behaviour")
    message = "samples=3, but the schedule has 2; change the schedule"
    refused(message, april.settings, rounds(), samples=3)
    refused("no setting 'sample'", april.settings, rounds(), sample=2, error=TypeError)
    message = "has correction='reject', which off_policy='truncate' would replace"
    refused(message, april.objective, april.preset("decoupled"), "truncate")
    base = runtime.GroupRelativeObjective(surrogate="sequence", clip_range=(3e-4, 4e-4))
    found = april.objective(base, "truncate")
    assert (found.surrogate, found.correction, found.max_weight) == (
        *("sequence", "truncate", 2.0),
    )
    # fewer prompts than a batch has: an epoch begins anew within it
    few = {"prompt_of": lambda n: Prompt([n % 3], n)}
    refused("have 3 different prompts, fewer than batch=4", run, rounds(), **few)
    run(rounds(allow_repeats=True, updates=1), **few)
    refused(
        "max_rejected=120 groups in a row may not train",
        run,
        rounds(),
        accept=lambda scores: False,
        error=RuntimeError,
    )
    assert_array_equal(rounds(recycle=False).eta, 0)  # what is left is too old
    one = {"planner": XRPO, "judge": right, **OTHER_PROMPTS}
    refused("rounds=3, but nobody plans them", run, rounds(**PLANNED))
    refused(
        "XRPO shows worked examples",
        run,
        rounds(**PLANNED),
        planner=xrpo.preset("xrpo"),
    )
    refused(
        "3 rounds, more than rounds=2; give",
        run,
        rounds(**PLANNED | {"rounds": 2}),
        **one,
    )
    few = rounds(**PLANNED | {"most_samples": 5})
    message = r"asks for [6-9] responses to a prompt in round [12], but most_samples=5"
    refused(message, run, few, **one)
    refused("most_samples=4 is outside", rounds, **PLANNED | {"most_samples": 4})
