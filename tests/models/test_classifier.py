"""Classifier: sizes, features, invariances, gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from tmdjax.models import Classifier, functional, init_params

MODULE = Classifier(num_classes=3, width=4, feature_dim=5)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 2)), jnp.float32)


@functools.cache
def initial():
    return init_params(MODULE, jax.random.key(0), X)


@functools.cache
def jitted(method=None):
    return jax.jit(functools.partial(functional(MODULE), method=method))


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (32, 32)])
def test_any_size_from_eight(size):
    x = jax.ShapeDtypeStruct((2, *size, 2), jnp.float32)
    logits = jax.eval_shape(jitted(), initial(), x)
    features = jax.eval_shape(jitted("features"), initial(), x)
    assert logits.shape == (2, 3) and logits.dtype == jnp.float32
    assert features.shape == (2, 5) and features.dtype == jnp.float32


def test_features_are_all_the_logits_see():
    features = np.asarray(jitted("features")(initial(), X), np.float64)
    hidden = features / (1 + np.exp(-features))
    head = jax.tree.map(np.asarray, initial()["head"])
    assert_allclose(
        jitted()(initial(), X), hidden @ head["kernel"] + head["bias"], atol=1e-5
    )


def test_norm_takes_contrast_away():
    """Biases start at zero, so the first norm undoes any positive scale."""
    once, thrice = (jitted("features")(initial(), s * X) for s in (1.0, 3.0))
    assert_allclose(once, thrice, atol=1e-4)


def test_nothing_is_tf32():
    text = str(jax.make_jaxpr(functional(MODULE))(initial(), X))
    convolutions = re.findall(r"conv_general_dilated\[.*?\n *\]", text, re.DOTALL)
    assert len(convolutions) == 3
    assert all("Precision.HIGHEST" in convolution for convolution in convolutions)


def test_refusals(as_shipped):
    for shape in ((2, 7, 8, 1), (8, 8, 1)):
        with pytest.raises(ValueError, match="at least 8 x 8"):
            functional(MODULE)(initial(), jnp.zeros(shape), method="features")
    with pytest.raises(ValueError, match="num_classes=0 must be at least 1"):
        Classifier(num_classes=0)
    with pytest.raises(TypeError, match=r"width=8\.0 is of type float"):
        Classifier(num_classes=2, width=8.0)
    with pytest.raises(ValueError, match="unknown GEMM recipe"):
        Classifier(num_classes=2, recipe="int4")
