import functools
import os
import stat

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from tmdjax import generation, models
from tmdjax.core import checks, conventions, files, prng, registry, trees
from tmdjax.flows import distribution_matching


def test_sample_keys_do_not_depend_on_the_microbatch():
    key = jax.random.key(1)
    whole = prng.normal(prng.sample_keys(key, 8), (4,))
    parts = [prng.normal(prng.sample_keys(key, 4, start=s), (4,)) for s in (0, 4)]
    np.testing.assert_array_equal(whole, jnp.concatenate(parts))
    jitted = jax.jit(lambda k: prng.normal(prng.sample_keys(k, 8), (4,)))(key)
    np.testing.assert_array_equal(whole, jitted)


def test_fold_in_broadcasts():
    keys = prng.sample_keys(jax.random.key(0), 3)
    folded = prng.fold_in(keys, 5)
    for i in range(3):
        np.testing.assert_array_equal(
            jax.random.key_data(folded[i]),
            jax.random.key_data(jax.random.fold_in(keys[i], 5)),
        )


def test_a_split_of_many_keys_is_each_keys_own():
    keys = prng.sample_keys(jax.random.key(3), 4)
    parts = prng.split(keys, 3)
    own = [jax.random.split(key, 3) for key in keys]
    np.testing.assert_array_equal(
        jax.random.key_data(parts), np.stack([jax.random.key_data(k) for k in own])
    )
    assert len(np.unique(jax.random.key_data(parts).reshape(12, -1), axis=0)) == 12


def test_registry(refused):
    table = registry.Registry("solver")
    table.register("euler")(1)
    refused("registered already", table.register("euler"), 2)
    refused(r"unknown solver 'eular'.*'euler'", table.__getitem__, "eular")
    assert list(table) == ["euler"] and "euler" in table and len(table) == 1


def test_trees():
    tree = {"a": {"w": jnp.ones((2, 3))}, "b": [jnp.zeros(4, jnp.bfloat16)]}
    assert list(trees.flatten(tree)) == ["a/w", "b/0"]
    assert trees.count(tree) == 10
    assert trees.nbytes(tree) == 6 * 4 + 4 * 2
    named = trees.map_with_path(lambda name, leaf: name, tree)
    assert named == {"a": {"w": "a/w"}, "b": ["b/0"]}
    assert bool(trees.all_finite(tree))
    assert not bool(trees.all_finite({"a": jnp.array([1.0, jnp.inf])}))
    assert bool(trees.all_finite({"n": 3}))


def test_content_hash_sees_every_bit_and_name(refused):
    x, content = np.ones(3, np.float32), trees.content_hash
    assert content({"a": x}) == content({"a": x.copy()})
    assert content({"a": x}) != content({"a": np.nextafter(x, np.float32(2))})
    assert content({"b": x}) != content({"a": x})
    assert content({"a/b": x}) != content({"a": {"b": x}})
    words, objects = "only numbers", {"a": np.array(["x", None], object)}
    refused(words, content, objects, error=TypeError)


def test_atomic_write_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.json"
    files.write_atomically(path, b"old")
    assert path.read_bytes() == b"old"
    for mask in (0o077, 0o022):  # who keeps files private keeps these private
        before = os.umask(mask)
        files.write_atomically(path, b"old")
        os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_bad_values_are_named(refused):
    of_type = functools.partial(refused, error=TypeError)
    words = r"one time a sample, \(3,\)"
    refused(words, conventions.expand_time, jnp.zeros(2), 3)
    assert conventions.expand_time(0.5, 3).shape == (3,)
    checks.check_time(np.array([0.0, 1.0]))
    words = r"outside \[0, 1\].*1000 t"
    refused(words, checks.check_time, np.array([0.5, 1.5]))
    refused(r"outside \[0, 1\]", checks.check_time, float("nan"))
    jax.jit(checks.check_time)(2.0)  # traced values pass
    array = np.zeros((3, 4))
    checks.check_finite(array.astype(int), "x")
    array[1, 2] = np.nan
    words = r"images has 1 non-finite.*index \(1, 2\)"
    for dtype in (float, jnp.bfloat16, jnp.complex64):
        refused(words, checks.check_finite, array.astype(dtype), "images")
    given = ("method", "midpiont", ["euler", "midpoint"])
    refused("Did you mean 'midpoint'", checks.check_choice, *given)
    words, given = r"rate=2 is outside \(0, 1\]", ("rate", 2, 0, 1)
    refused(words, checks.check_range, *given, open_low=True)
    pair = ("a", np.zeros(2), "b", np.zeros(3))
    refused(r"\(2,\).*\(3,\)", checks.check_same_shape, *pair)
    words = "leading axis must be the batch, 4"
    refused(words, checks.check_batch, "keys", np.zeros(2), 4)
    assert checks.check_count("depth", np.int32(3)) == 3
    for value in (2.0, "2", True, None):
        of_type(r"depth=.*give an integer", checks.check_count, "depth", value)
    refused(r"depth=0 must be at least 1", checks.check_count, "depth", 0)


def test_long_values_are_shown_in_brief():
    assert checks.brief([1, "a"]) == "[1, 'a']"
    shown = checks.brief(tuple(range(10**5)))
    assert shown.startswith("(0, 1, 2") and "99998, 99999) (688890 char" in shown
    for call, value in (
        (lambda x: checks.check_choice("a", x, ("b", "c")), "x" * 10**5),
        (lambda x: models.DecoderConfig.from_hf({"model_type": "llama", "k": x}), [7]),
        (generation.CharTokenizer("ab").encode, "abc"),
        (lambda x: checks.check_count("a", x), "x" * 10**5),
        (lambda x: checks.check_range("a", x, 0), "x" * 10**5),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            call(value * 10**5 if len(value) < 9 else value)
        assert len(str(error.value)) < 1000


def test_keys_that_are_none_are_refused(refused):
    key, of_type = jax.random.key(0), functools.partial(refused, error=TypeError)
    of_type("typed key", prng.sample_keys, jax.random.PRNGKey(0), 2)
    of_type("only integers fold", prng.fold_in, key, 0.5)
    refused("must not be negative", prng.sample_keys, key, 2, start=-1)
    refused("give one key", prng.sample_keys, jax.random.split(key, 4), 4)


def test_keys_of_samples_are_one_program(count_compiles):
    key = jax.random.key(3)
    with count_compiles() as found:
        keys = prng.sample_keys(key, 23, start=5)
        folded = prng.fold_in(keys, 7)
    assert len(found) <= 2
    expected = [jax.random.fold_in(key, 5 + i) for i in (0, 22)]
    expected += [jax.random.fold_in(own, 7) for own in expected]
    ours, again = (np.asarray(jax.random.key_data(x)) for x in (keys, folded))
    rows = [ours[0], ours[22], again[0], again[22]]
    np.testing.assert_array_equal(rows, [jax.random.key_data(x) for x in expected])


def test_shapes_are_checked_while_tests_run():
    """Those of functions and methods; functions without shapes are left bare."""
    two, three = jnp.zeros((2, 1)), jnp.zeros((3, 1))
    dense = models.layers.Dense(4)
    for call in (
        lambda: distribution_matching.discriminator_loss(two, three),
        lambda: distribution_matching.generator_loss(two[0]),
        lambda: dense.init(jax.random.key(0), jnp.zeros((2, 3), int)),
    ):
        with pytest.raises(jaxtyping.TypeCheckError):
            call()
    assert not hasattr(checks.check_name, "__wrapped__")
    assert hasattr(distribution_matching.generator_loss, "__wrapped__")
