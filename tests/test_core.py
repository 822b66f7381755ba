import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax.core import checks, conventions, files, prng, registry, trees


def test_bridge_twice_is_identity():
    def v(x, t, cond):
        return x * t[:, None] + cond

    x = jax.random.normal(jax.random.key(0), (5, 3))
    t = jnp.array([0.0, 0.25, 0.5, 0.75, 1.0])
    twice = conventions.flip_velocity(conventions.flip_velocity(v))
    np.testing.assert_array_equal(twice(x, t, 2.0), v(x, t, 2.0))


def test_bridge_integrates_the_same_flow():
    # u(x, tau) = a x moves tau from 0 to 1 by exp(a): the flipped field must do
    # the same from t = 1 down to 0.
    a, n = 0.7, 2000
    v = conventions.flip_velocity(lambda x, tau, cond: a * x)
    x = jnp.ones((1, 1))
    for i in range(n):
        x = x - v(x, jnp.full((1,), 1 - i / n), None) / n
    assert abs(float(x[0, 0]) - np.exp(a)) < 1e-3


def test_time_flip_round_trip():
    t = np.linspace(0, 1, 11)
    np.testing.assert_allclose(conventions.flip_time(conventions.flip_time(t)), t)


def test_expand_time():
    assert conventions.expand_time(0.5, 3).shape == (3,)
    with pytest.raises(ValueError, match=r"one time a sample, \(3,\)"):
        conventions.expand_time(jnp.zeros(2), 3)


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


def test_raw_keys_are_refused(as_shipped):
    with pytest.raises(TypeError, match="typed key"):
        prng.sample_keys(jax.random.PRNGKey(0), 2)


def test_time_check():
    checks.check_time(np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"outside \[0, 1\].*1000 t"):
        checks.check_time(np.array([0.5, 1.5]))
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        checks.check_time(float("nan"))
    jax.jit(lambda t: checks.check_time(t))(2.0)  # traced values pass


def test_finite_check_names_the_place():
    array = np.zeros((3, 4))
    array[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"images.*index \(1, 2\)"):
        checks.check_finite(array, "images")


def test_choice_suggests():
    with pytest.raises(ValueError, match="Did you mean 'midpoint'"):
        checks.check_choice("method", "midpiont", ["euler", "midpoint"])
    with pytest.raises(ValueError, match=r"rate=2 is outside \(0, 1\]"):
        checks.check_range("rate", 2, 0, 1, open_low=True)


def test_shape_checks():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        checks.check_same_shape("a", np.zeros(2), "b", np.zeros(3))
    with pytest.raises(ValueError, match="leading axis must be the batch, 4"):
        checks.check_batch("keys", np.zeros(2), 4)


def test_registry():
    table = registry.Registry("solver")
    table.register("euler")(1)
    with pytest.raises(ValueError, match="registered already"):
        table.register("euler")(2)
    with pytest.raises(ValueError, match=r"unknown solver 'eular'.*'euler'"):
        table["eular"]
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


def test_content_hash_sees_every_bit():
    tree = {"a": np.ones(3, np.float32)}
    same = {"a": np.ones(3, np.float32)}
    other = {"a": np.nextafter(np.ones(3, np.float32), 2)}
    assert trees.content_hash(tree) == trees.content_hash(same)
    assert trees.content_hash(tree) != trees.content_hash(other)
    assert trees.content_hash({"b": tree["a"]}) != trees.content_hash(tree)


def test_atomic_write_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.json"
    files.write_atomically(path, b"old")
    assert path.read_bytes() == b"old"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_finite_check_sees_narrow_and_complex_numbers():
    for dtype in (jnp.bfloat16, jnp.complex64):
        with pytest.raises(ValueError, match=r"x has 1 non-finite"):
            checks.check_finite(jnp.array([jnp.nan], dtype), "x")
    checks.check_finite(np.array([1, 2]), "x")


def test_counts():
    assert checks.check_count("depth", np.int32(3)) == 3
    for value in (2.0, "2", True, None):
        with pytest.raises(TypeError, match=r"depth=.*give an integer"):
            checks.check_count("depth", value)
    with pytest.raises(ValueError, match=r"depth=0 must be at least 1"):
        checks.check_count("depth", 0)


def test_only_counts_fold_into_keys(as_shipped):
    key = jax.random.key(0)
    with pytest.raises(TypeError, match="only integers fold"):
        prng.fold_in(key, 0.5)
    with pytest.raises(ValueError, match="must not be negative"):
        prng.sample_keys(key, 2, start=-1)
    with pytest.raises(ValueError, match="give one key"):
        prng.sample_keys(jax.random.split(key, 4), 4)


def test_content_hash_tells_nested_from_flat_and_refuses_objects():
    x = np.ones(2)
    assert trees.content_hash({"a/b": x}) != trees.content_hash({"a": {"b": x}})
    with pytest.raises(TypeError, match="only numbers"):
        trees.content_hash({"a": np.array(["x", None], object)})
