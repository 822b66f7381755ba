"""Classifier: sizes, features, invariances, gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import draw, jitted
from numpy.testing import assert_allclose

from tmdjax.models import Classifier, functional, init_params

MODULE = Classifier(num_classes=3, width=4, feature_dim=5)
X = draw(4, 8, 8, 2)


@functools.cache
def initial():
    return init_params(MODULE, jax.random.key(0), X)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (32, 32)])
def test_any_size_from_eight(size):
    x = jax.ShapeDtypeStruct((2, *size, 2), jnp.float32)
    logits = jax.eval_shape(jitted(MODULE), initial(), x)
    features = jax.eval_shape(jitted(MODULE, "features"), initial(), x)
    assert logits.shape == (2, 3) and logits.dtype == jnp.float32
    assert features.shape == (2, 5) and features.dtype == jnp.float32


def test_features_are_all_the_logits_see():
    features = np.asarray(jitted(MODULE, "features")(initial(), X), np.float64)
    hidden = features / (1 + np.exp(-features))
    head = jax.tree.map(np.asarray, initial()["head"])
    logits = hidden @ head["kernel"] + head["bias"]
    assert_allclose(jitted(MODULE)(initial(), X), logits, atol=1e-5)


def test_norm_takes_contrast_away():
    """Biases start at zero, so the first norm undoes any positive scale."""
    once, thrice = (jitted(MODULE, "features")(initial(), s * X) for s in (1.0, 3.0))
    assert_allclose(once, thrice, atol=1e-4)


def test_nothing_is_tf32():
    text = str(jax.make_jaxpr(functional(MODULE))(initial(), X))
    convolutions = re.findall(r"conv_general_dilated\[.*?\n *\]", text, re.DOTALL)
    assert len(convolutions) == 3
    assert all("Precision.HIGHEST" in convolution for convolution in convolutions)


def test_refusals(refused):
    features = functools.partial(functional(MODULE), initial(), method="features")
    for shape in ((2, 7, 8, 1), (8, 8, 1)):
        refused("at least 8 x 8", features, jnp.zeros(shape))
