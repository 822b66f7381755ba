"""The engine: no token lost or doubled, whatever happens in between."""

import dataclasses
import functools
import logging

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from integer_model import OTHER, PARAMS, VOCAB, integer_model, logits_of
from numpy.testing import assert_allclose
from scipy.special import log_softmax

from tmdjax.generation import Engine, EngineConfig, Sampling

KEY = jax.random.key(7)
STOP = 4
CONFIG = EngineConfig(slots=3, length=40, steps=4, prefill_rows=2, stop=(STOP,))
MODEL = integer_model()
PROMPTS = [(1, 2, 3), (5,), (0, 6, 7, 8, 9, 10, 11), (1, 2, 3, 3)]
LIMITS = [9, 12, 5, 20]


def made(key=KEY, params=PARAMS, decode=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return Engine(MODEL, params, config, key, decode=decode)


SHARED = made()


def idle():
    """The engine of the tests that change neither weights nor settings."""
    SHARED.abort()
    return SHARED


def oracle(prompt, number, limit, salts=lambda i: 5, read=None, stop=(STOP,)):
    """A response drawn token by token from the whole text.

    ``salts(i)`` are the weights that draw token i, ``read`` those that its text was
    read with; by default the same for all of it.
    """
    text, found, log_probs = list(prompt), [], []
    key = jax.random.fold_in(KEY, number)
    while len(found) < limit:
        i = len(found)
        salt = salts(i)
        given = [read(j, i) if read else salt for j in range(len(text))]
        log_p = log_softmax(logits_of(zip(text, given), salt))
        noise = np.asarray(jax.random.gumbel(jax.random.fold_in(key, i), (VOCAB,)))
        token = int(np.argmax(log_p.astype(np.float32) + noise))
        text.append(token)
        found.append(token)
        log_probs.append(log_p[token])
        if token in stop:
            break
    return found, log_probs


EXPECTED = {
    (p, n): oracle(PROMPTS[p], n, LIMITS[p]) for p in range(4) for n in (p, p + 10)
}


def check_text(record, p):
    tokens, log_probs = EXPECTED[p, record.number]
    assert record.tokens == tokens
    assert_allclose(record.log_probs, log_probs, atol=1e-5)
    assert record.status == ("stop" if tokens[-1] == STOP else "length")
    record.check()


@pytest.mark.parametrize("slots, steps, rows", [(3, 4, 2), (1, 1, 1), (8, 7, 4)])
def test_g6_texts_do_not_depend_on_slots_chunks_or_company(slots, steps, rows):
    engine = made(slots=slots, steps=steps, prefill_rows=rows)
    for p, prompt in enumerate(PROMPTS):
        engine.submit([p, p + 10], prompt, group=p, max_new_tokens=LIMITS[p])
    found = engine.run()
    assert [r.number for r in found] == [0, 1, 2, 3, 10, 11, 12, 13]
    for record in found:
        check_text(record, record.group)
    assert engine.counts["submitted"] == 8
    assert engine.counts["stop"] + engine.counts["length"] == 8
    assert engine.counts["drawn"] == sum(map(len, found))


def test_g1_a_group_is_prefilled_once_and_nothing_compiles_again():
    engine = made(slots=8)
    engine.submit(range(6), PROMPTS[2], max_new_tokens=4)
    engine.run()
    assert engine.counts["prefilled"] == len(PROMPTS[2]) - 1
    programs = (engine._generate, engine._prefill, engine._insert)
    sizes = [program._cache_size() for program in programs]
    assert sizes[0] == 1
    for p in (0, 2, 3):
        engine.submit([20 + p], PROMPTS[p], max_new_tokens=9)
    engine.run()
    assert [program._cache_size() for program in programs] == sizes


def test_g1_a_group_larger_than_the_slots_is_prefilled_once_too():
    engine = made(slots=3)
    for p in (2, 3):
        engine.submit(range(10 * p, 10 * p + 8), PROMPTS[p], max_new_tokens=4)
    found = engine.run()
    assert engine.counts["prefilled"] == len(PROMPTS[2]) + len(PROMPTS[3]) - 2
    assert not engine._shared
    for record in found:
        assert record.tokens == oracle(record.prompt, record.number, 4)[0]


def test_shared_prefills_are_forgotten_with_the_weights():
    engine = made(slots=1, stop=())
    engine.submit([0, 1], PROMPTS[0], max_new_tokens=4)
    engine.advance()
    engine.update_weights(OTHER, 1)
    second = engine.run()[-1]
    assert second.tokens == oracle(PROMPTS[0], 1, 4, salts=lambda i: 11, stop=())[0]


def test_prompts_up_to_the_whole_slot():
    engine = idle()
    prompt = tuple((np.arange(39) % VOCAB).tolist())
    engine.submit([0], prompt, max_new_tokens=1)
    engine.submit([1], prompt[:30], max_new_tokens=10)
    a, b = engine.run()
    assert a.tokens == oracle(prompt, 0, 1)[0]
    assert b.tokens == oracle(prompt[:30], 1, 10)[0]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from("sraR"), st.integers(0, 255)), max_size=30))
def test_g7_storms_of_aborts_and_resumes(events):
    """s: submit, r: run a chunk, a: abort some, R: resume some."""
    engine, waiting, done, aborted = idle(), list(EXPECTED), [], []
    submitted = []
    for what, choice in [*events, *[("R", 255), ("s", 0)] * 8, *[("r", 0)] * 40]:
        if what == "s" and waiting:
            p, number = waiting.pop(choice % len(waiting))
            engine.submit([number], PROMPTS[p], group=p, max_new_tokens=LIMITS[p])
            submitted.append(number)
        elif what == "r":
            done += engine.advance()
        elif what == "a":
            some = [n for i, n in enumerate(submitted) if choice >> (i % 8) & 1]
            aborted += engine.abort(some)
        elif what == "R":
            chosen = [r for i, r in enumerate(aborted) if choice >> (i % 8) & 1]
            for record in chosen:
                aborted.remove(record)
                engine.resume(record, max_new_tokens=LIMITS[record.group])
    assert sorted(r.number for r in done) == sorted(n for _, n in EXPECTED)
    assert not aborted and not engine.active and not engine.queued
    for record in done:
        check_text(record, record.group)


def test_g7_an_aborted_record_goes_on_in_another_engine():
    first, second = idle(), made(slots=5, steps=3)
    first.submit([3], PROMPTS[3], group=3, max_new_tokens=LIMITS[3])
    first.advance()
    (record,) = first.abort()
    assert record.status == "aborted" and 0 < len(record) < len(EXPECTED[3, 3][0])
    assert first.abort() == [] and first.abort([99]) == []
    second.resume(record, max_new_tokens=LIMITS[3])
    second.run()
    check_text(record, 3)
    assert record.segments == 2


@pytest.mark.parametrize("recompute", [True, False])
def test_g4_weights_swapped_in_the_middle(recompute, refused):
    """Tokens carry the version that drew them; old keys and values stay or go."""
    engine = made(stop=())
    engine.submit([0, 10], PROMPTS[0], max_new_tokens=11)
    engine.advance()
    engine.update_weights(OTHER, 3, recompute=recompute)
    engine.submit([20], PROMPTS[0], max_new_tokens=6)
    found = engine.run()
    # 4 tokens are drawn before; what is read last then is token 3 of the response
    cut = len(PROMPTS[0]) + 3

    def read(j, i):
        return 5 if i < 4 or (not recompute and j < cut) else 11

    options = dict(salts=lambda i: 5 if i < 4 else 11, read=read, stop=())
    for record in found[:2]:
        expected = oracle(PROMPTS[0], record.number, 11, **options)
        assert record.tokens == expected[0]
        assert record.versions == [0] * 4 + [3] * 7
        assert record.kv_mixed is not recompute
    fresh = oracle(PROMPTS[0], 20, 6, salts=lambda i: 11, stop=())
    assert found[2].tokens == fresh[0] and found[2].versions == [3] * 6
    engine.update_weights(PARAMS, 1)  # no text is there whose versions could fall
    engine.submit([30], PROMPTS[0], max_new_tokens=6)
    message = "1 must be above the present one, 1, while 1 texts"
    refused(message, engine.update_weights, PARAMS, 1)


def spelt(tokens):
    """Two letters a token, so that a text may begin and end within tokens."""
    return "".join("abcdefghijklm"[t] + "nopqrstuvwxyz"[t] for t in tokens)


@pytest.mark.parametrize("steps, slots", [(4, 3), (1, 1), (16, 2)])
def test_stop_strings_end_a_response_wherever_they_stand(steps, slots):
    plain = [oracle(PROMPTS[0], n, 20, stop=()) for n in range(4)]
    tokens, _ = plain[0]
    across = spelt(tokens[4:8])[1:-1]  # begins and ends in the middle of a token
    engine = made(
        stop=(), stop_strings=("zzz", across), steps=steps, slots=slots, decode=spelt
    )
    engine.submit(range(4), PROMPTS[0], max_new_tokens=20)
    for record, (expected, log_probs) in zip(engine.run(), plain):
        ends = [n for n in range(1, 21) if across in spelt(expected[:n])]
        end = ends[0] if ends else 20
        assert record.tokens == expected[:end]
        assert_allclose(record.log_probs, log_probs[:end], atol=1e-5)
        assert record.status == ("stop" if ends else "length")
        record.check()
    assert not engine.active and engine.counts["stop"] >= 1


def test_greedy_takes_the_most_likely():
    engine = made(sampling=Sampling(temperature=0.0), stop=())
    engine.submit([0], PROMPTS[0], max_new_tokens=6)
    (record,) = engine.run()
    text = list(PROMPTS[0])
    for token in record.tokens:
        assert token == int(np.argmax(logits_of([(t, 5) for t in text], 5)))
        text.append(token)
    assert record.log_probs == [0.0] * 6


def test_sizes_are_told_before_anything_is_allocated(caplog):
    with caplog.at_level(logging.INFO, "tmdjax.generation.engine"):
        made()
    assert "3 slots of 40 tokens: weights 0.000 GB, cache 0.000 GB" in caplog.text


def test_refused_requests(refused):
    engine = idle()
    engine.submit([99], (2,), max_new_tokens=2)
    for numbers, prompt, limit, message in (
        ([1], (), 2, "request 1 has an empty prompt"),
        ([1], (2, 13), 2, "token 13, outside the vocabulary of 13"),
        ([1], (2,) * 30, 11, "30 and max_new_tokens=11 make 41 tokens, .* holds 40"),
        ([1, 1], (2,), 2, r"request numbers \[1, 1\] are not unique"),
        ([-1], (2,), 2, "number=-1"),
        ([2**32], (2,), 2, "number=4294967296"),
        ([1], (2,), 0, "max_new_tokens=0"),
        ([99], (2,), 2, "request 99 is already under way"),
    ):
        refused(message, engine.submit, numbers, prompt, max_new_tokens=limit)
        assert engine.queued == 1
    asked = functools.partial(refused, error=TypeError, max_new_tokens=2)
    for prompt in ((1.7, 2), "12", (True,)):
        asked("a token=.* give an integer", engine.submit, [1], prompt)


def test_refused_resumption(refused):
    engine = made(stop=())
    engine.submit([1], (2,), max_new_tokens=9)
    engine.advance()
    (record,) = engine.abort()
    refused("has 4 tokens already; max", engine.resume, record, max_new_tokens=4)
    for name, value, message in (
        ("versions", [0, 0, 0, 2], "tokens of version 2, but this engine has"),
        ("log_probs", record.log_probs[:3], "4 tokens, 3 log-probs and 4 versions"),
        ("status", "stop", "is 'stop'; only an aborted one"),
    ):
        other = dataclasses.replace(record, **{name: value})
        refused(message, engine.resume, other, max_new_tokens=9)


def test_refused_engines(refused):
    refused("stop token 13 is outside", made, stop=(13,))
    refused("slots=0", made, slots=0)
    refused("give the engine decode=tokenizer.decode", made, stop_strings=("a",))
    refused("none of them empty", made, stop_strings=("",), decode=spelt)
    refused("give a tuple of texts", made, stop_strings="ab", decode=spelt)
    refused("give a tuple of texts", made, stop_strings=(3,), decode=spelt)
    for stop in (3, None, "3", (3.0,), (True,)):
        refused("stop=.* give a tuple of integers", made, stop=stop)
    refused("typed key", made, key=np.zeros(2, np.uint32), error=TypeError)
