import itertools

from tmdjax.domains.arithmetic.written_work import (
    OPERATIONS,
    chain_sum_response,
    countdown_reward,
    exact_reward,
    list_response,
    split_response,
)


def test_running_sums():
    for terms, modulus, expected in (
        ((5, 8, 9), 97, "505813922#22$"),
        ((5, 8, 9), 10, "558392#2$"),
        ((9,) * 11, 97, "909918927936945954963972981990902#02$"),
        ((0,), 97, "000#00$"),
    ):
        assert chain_sum_response(terms, modulus) == expected


def test_passes_by_hand():
    for operation, items, rank, expected in (
        ("sort", (3, 1, 2), 1, "123#123$"),
        ("sort", (3, 2, 1), 1, "213;123#123$"),
        ("sort", (1, 2, 2), 1, "#122$"),
        ("reverse", (4, 0, 7), 1, "7;70;704#704$"),
        ("dedup", (4, 0, 4, 1), 1, "4;40;40;401#401$"),
        ("largest", (3, 9, 9, 2), 3, "392;32#3$"),
        ("largest", (5,), 1, "#5$"),
    ):
        assert list_response(operation, items, rank) == expected
    assert list_response("largest", (3, 1, 2)).endswith("#3$")


def test_answers_are_those_of_python():
    for items in itertools.product((0, 3, 9), repeat=4):
        answers = {
            "sort": sorted(items),
            "reverse": list(reversed(items)),
            "dedup": sorted(set(items), key=items.index),
        }
        for operation, expected in answers.items():
            _, answer = split_response(list_response(operation, items))
            assert answer == "".join(map(str, expected))
        for rank in range(1, 5):
            _, answer = split_response(list_response("largest", items, rank))
            assert answer == str(sorted(items)[-rank])


def test_passes_of_bubble_sort_are_as_many_as_the_longest_way_left():
    # Each pass moves an item that stands behind larger ones one place to the left.
    for items in itertools.permutations(range(5)):
        work, _ = split_response(list_response("sort", items))
        passes = work.split(";") if work else []
        larger = [sum(a > b for a in items[:i]) for i, b in enumerate(items)]
        assert len(passes) == max(larger)


def test_only_the_whole_work_is_paid():
    gold = chain_sum_response((5, 8, 9), 97)
    assert exact_reward(gold, gold) == 1.0
    assert exact_reward(gold + "__$#", gold) == 1.0  # what follows the end is not read
    for i, character in enumerate(gold):
        for other in "0123456789#$_".replace(character, ""):
            assert exact_reward(gold[:i] + other + gold[i + 1 :], gold) == 0.0
    assert exact_reward(gold[:-1], gold) == 0.0
    assert exact_reward("#22$", gold) == 0.0
    assert exact_reward("", gold) == 0.0


def test_countdown_pays_the_answer_whatever_the_work():
    numbers, target = (3, 25, 7), 54
    for response in ("#(25-7)*3$", "25-7=18;18*3=54#3*(25-7)$", "nonsense##3*(25-7)$"):
        assert countdown_reward(response, numbers, target) == 1.0
    for response in ("", "#", "#$", "(25-7)*3$", "#(25-7)*3", "#54$", "#(25-7)*2$"):
        assert countdown_reward(response, numbers, target) == 0.0


def test_bad_input(refused):
    refused(r"modulus=11 is not one of \(10, 97\)", chain_sum_response, (1, 2), 11)
    refused("terms is empty", chain_sum_response, (), 97)
    refused("terms holds 12; each must be a digit", chain_sum_response, (1, 12), 97)
    refused("operation='sorted'.*mean 'sort'", list_response, "sorted", (1, 2))
    refused(r"rank=3 is outside \[1, 2\]", list_response, "largest", (1, 2), 3)
    refused("items holds -1", list_response, OPERATIONS[0], (1, -1))
