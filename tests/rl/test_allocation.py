"""Where further responses go (XRPO's sheet, invariants 1 to 5 and 11)."""

import itertools

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import rl

MIXED = np.repeat([0.5, 0.0], 16)
FOUR = np.full(32, 4)


def test_1_half_widths_are_students():
    """Quantiles of a table: t_{0.975} of 1, 2, 5, 10 and 30 degrees of freedom."""
    quantiles = {1: 12.7062, 2: 4.3027, 5: 2.5706, 10: 2.2281, 30: 2.0423}
    count = np.array(list(quantiles)) + 1
    found = rl.half_width(count, np.sqrt(count))
    assert_allclose(found, list(quantiles.values()), atol=1e-4)
    assert rl.half_width(10**8, 1.0) < 2e-4
    assert_array_equal(rl.half_width(count, np.zeros(5)), 0)
    # of one degree of freedom, Cauchy's: 2 / (pi alpha), far out
    far = rl.half_width(2, np.sqrt(2), 1e-12)
    assert_allclose(far, 2e12 / np.pi, rtol=1e-6)
    assert rl.half_width(4, 0.0, 1e-17) == 0


def test_2_one_more_response_tells_less_and_less():
    n = np.arange(2, 60)
    gain = rl.priority(n, 0.5, 1, exploration=0.0)
    assert (gain > 0).all() and (np.diff(gain) < 0).all()
    assert_allclose(gain[[0, 1, 2, 6]], [3.25, 0.447, 0.175, 0.034], rtol=0.01)
    assert_allclose(rl.priority(n, 0.25, 1, exploration=0.0), gain / 2, rtol=1e-12)
    bonus = [rl.priority(8, 0.0, 1, exploration=1.0, bonus=b) for b in rl.BONUSES]
    assert_allclose(bonus, [0.2943, 0.0866], rtol=1e-3)  # sqrt(log 2 / 8), log 2 / 8


@pytest.mark.parametrize(
    "exploration, counts",
    [(0.03, (12, 4)), (0.05, (11, 5)), (0.1, (10, 6)), (0.3, (9, 7)), (1.0, (8, 8))],
)
def test_3_two_rounds_give_the_numbers_of_the_sheet(exploration, counts):
    """32 prompts of 4 responses, half of them mixed; 128 more in two rounds."""
    n = FOUR
    for _ in range(2):
        n = n + rl.allocate(n, MIXED, 64, most=32, exploration=exploration)
    assert_allclose([n[:16].mean(), n[16:].mean()], counts, atol=0.5)


def test_3_without_a_bonus_certain_prompts_get_nothing_and_with_all_of_it_all_the_same():
    found = rl.allocate(FOUR, MIXED, 300, most=32, exploration=0.0)
    assert not found[16:].any()
    found = rl.allocate(FOUR, MIXED, 460, most=32, exploration=0.0)
    assert (found[:16] == 28).all()  # the rest has nowhere else to go
    assert np.ptp(found[16:]) <= 1
    std = np.array([0.1, 0.5, 0.3])
    first = rl.allocate([4, 4, 4], std, 1, most=9, exploration=0.0)
    assert first.tolist() == [0, 1, 0]
    n = np.array([2, 5, 3, 2])
    for options in ({"exploration": 1e9}, {"rule": "uniform"}):
        total = n + rl.allocate(n, [0.5, 0.1, 0.0, 0.3], 13, most=20, **options)
        assert np.ptp(total) <= 1, options


@pytest.mark.parametrize("rule", rl.RULES)
def test_4_the_budget_is_spent_exactly_below_the_most_and_order_does_not_matter(rule):
    rng = np.random.default_rng(0)
    for budget in (0, 1, 37, 90):
        n, std = rng.integers(2, 9, 12), rng.uniform(0.1, 0.5, 12)
        order, last = rng.permutation(12), rng.random(12) < 0.3
        given = {"most": 16, "rule": rule, "trials": 60.0}
        found = rl.allocate(n, std, budget, last=last, **given)
        assert found.sum() == budget and (found >= 0).all() and (n + found <= 16).all()
        if found[last].any():
            assert (n + found == 16)[~last].all()
        # a cap that nobody can reach costs nothing
        free = [rl.allocate(n, std, budget, **given | {"most": m}) for m in (99, 10**9)]
        assert_array_equal(*free)
        if rule == "greedy":  # without ties
            other = rl.allocate(n[order], std[order], budget, last=last[order], **given)
            assert_array_equal(other, found[order])


def test_4_proportional_shares_are_in_proportion():
    n, std = np.full(3, 4), np.array([0.1, 0.2, 0.5])
    given = {"most": 100, "rule": "proportional", "exploration": 0.0}
    assert rl.allocate(n, std, 80, **given).tolist() == [10, 20, 50]
    assert rl.allocate(n, std * 0, 6, **given).tolist() == [2, 2, 2]
    assert rl.allocate(n, std, 20, **given | {"most": 12}).sum() == 20


def test_5_greedy_is_the_best_of_all_allocations():
    """Brute force over every way to spend the budget on four prompts."""
    rng = np.random.default_rng(1)
    for budget, exploration in itertools.product((1, 4, 7), (0.0, 0.05)):
        n, std = rng.integers(2, 6, 4), rng.uniform(0, 0.5, 4)
        options = {"exploration": exploration}

        def gained(given, n=n, std=std, options=options):
            return sum(
                float(rl.priority(n[q] + j, std[q], 20.0, **options))
                for q in range(4)
                for j in range(given[q])
            )

        ways = [
            way
            for way in itertools.product(range(budget + 1), repeat=4)
            if sum(way) == budget and max(np.array(way) + n) <= 9
        ]
        given = rl.allocate(n, std, budget, most=9, trials=20.0, **options)
        assert gained(given) == pytest.approx(max(map(gained, ways)), rel=1e-12)


def change_of_error(p, prior):
    """Of the means of mixed prompts against 8 responses each, in standard errors."""
    rng, p = np.random.default_rng(2), np.repeat(p, 4)
    budget, difference = 8 * len(p), []
    for _ in range(300):
        rewards, n = rng.random((len(p), 32)) < p[:, None], np.full(len(p), 4)
        for rounds in (2, 1):
            seen = np.arange(32) < n[:, None]
            std = np.std(rewards, axis=1, ddof=1, where=seen)
            if prior:
                std = rl.posterior_std((rewards & seen).sum(1), n)
            n = n + rl.allocate(n, std, (budget - n.sum()) // rounds, most=32)
        assert n.sum() == budget
        ours = np.mean(rewards, axis=1, where=np.arange(32) < n[:, None])
        error = (ours - p) ** 2 - (rewards[:, :8].mean(1) - p) ** 2
        difference.append(error[(0 < p) & (p < 1)].mean())
    return np.mean(difference) / np.std(difference) * np.sqrt(300)


def test_11_means_of_mixed_prompts_are_known_better_where_few_are_mixed():
    """Bernoulli prompts whose chances are known, 3 sigma; and where that ends.

    A mixed prompt whose first four rewards happen to be equal counts as certain, and
    is starved: with half of all prompts mixed, equal counts are better. The prior of
    ``posterior_std`` mends that.
    """
    few, half = [0.2, 0.5, 0.8, 0, 0, 1, 1], [0.5, 0.5, 0, 1]
    assert change_of_error(few, prior=False) < -3
    assert change_of_error(half, prior=False) > 1
    assert change_of_error(few, prior=True) < -3
    assert change_of_error(half, prior=True) < -3


def test_a_prior_keeps_equal_rewards_from_being_certain():
    found = rl.posterior_std([0, 4, 2], [4, 4, 4])
    assert_allclose(found, [0.3, 0.3, 0.5])
    assert (np.diff(rl.posterior_std(0, np.arange(1, 9))) < 0).all()


def test_bad_inputs(refused):
    given = {"most": 8}
    n, std = [4, 4], [0.5, 0.0]
    for message, call, arguments, options in (
        ("needs at least 2 responses a prompt", rl.half_width, ([1, 2], std), {}),
        (r"alpha=1.0 is outside \(0, 1\)", rl.half_width, (n, std, 1.0), {}),
        ("std has 1 non-finite", rl.half_width, (n, [np.nan, 0.0]), {}),
        ("std=-0.5 is negative", rl.half_width, (n, [-0.5, 0.0]), {}),
        ("exploration=-1.0", rl.allocate, (n, std, 1), {"exploration": -1.0}),
        ("bonus='squared'", rl.allocate, (n, std, 1), {"bonus": "squared"}),
        ("rule='gready'.*mean 'greedy'", rl.allocate, (n, std, 1), {"rule": "gready"}),
        ("there is room for 8; raise most", rl.allocate, (n, std, 9), {}),
        ("have 4 to 9 responses", rl.allocate, ([4, 9], std, 1), {}),
        ("give one number a prompt each", rl.allocate, (n, [0.5], 1), {}),
        ("budget=-1 must be at least 0", rl.allocate, (n, std, -1), {}),
        ("right=5.0 is outside", rl.posterior_std, (5, 4), {}),
    ):
        options = given | options if call is rl.allocate else options
        refused(message, call, *arguments, **options)
    refused("numbers of responses", rl.half_width, [2.5], [0.1], error=TypeError)
