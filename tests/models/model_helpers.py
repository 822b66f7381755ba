"""What several of the model tests use."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import models

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


def below(stored, prefix):
    """The entries whose name starts with a prefix, without it."""
    return {k.removeprefix(prefix): stored[k] for k in stored if k.startswith(prefix)}


@functools.cache
def golden(case, file="decoder.npz"):
    with np.load(GOLDENS / file) as stored:
        return below(stored, f"{case}/")


def checkpoint(case):
    """Configuration and tensors of a small decoder of transformers."""
    config = json.loads(str(golden(case)["config"]))
    return models.DecoderConfig.from_hf(config), below(golden(case), "weights/")


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def draw_tokens(*shape):
    """Ids for a small decoder."""
    return jnp.asarray(np.random.default_rng(1).integers(0, 13, shape), jnp.int32)


def close(a, b, atol=1e-5):
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=atol), a, b)


def equal(a, b):
    jax.tree.map(assert_array_equal, a, b)


@functools.cache
def jitted(module, method=None, **options):
    apply_fn = functools.partial(models.functional(module), method=method)
    return jax.jit(functools.partial(apply_fn, **options))


def shapes_of(module, *inputs):
    """Its parameters without their values: nothing is allocated."""
    key = jax.random.key(0)
    return jax.eval_shape(lambda: models.init_params(module, key, *inputs))


def small_decoder(**changes):
    sizes = dict(vocab_size=13, hidden_size=8, intermediate_size=12, num_layers=3)
    heads = dict(num_heads=4, num_kv_heads=2, head_dim=4)
    return models.DecoderConfig(**sizes | heads | changes)


def stirred(params, scale=0.2, seed=0):
    """With noise on every leaf: networks that start at zero then do something."""
    rng = np.random.default_rng(seed)
    noise = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
    # in numpy: nothing is compiled for each shape
    moved = lambda p, n: np.asarray(p) + scale * n.astype(p.dtype)  # noqa: E731
    return jax.device_put(jax.tree.map(moved, params, noise))


@functools.cache
def random_params(config):
    """Parameters of a decoder, none of them where they start."""
    module, tokens = models.Decoder(config), jnp.zeros((1, 1), int)
    return stirred(models.init_params(module, jax.random.key(0), tokens), 0.3)


def both_parts(module):
    """The head of a split network on the features of its backbone."""
    apply_fn = models.functional(module)

    def fn(params, x, t, y, s, r, text):
        features = apply_fn(params, x, t, text, method="backbone")
        return apply_fn(params, y, s, r, features, method="head")

    return fn


def flax_dense(node, x):
    """A dense layer of flax with our parameters."""
    return nn.Dense(node["kernel"].shape[1]).apply({"params": node}, x)


def flax_attention(node, x, context, mask=None):
    """The attention of flax, of two heads, with our parameters."""
    width = x.shape[-1]
    heads = {"kernel": (width, 2, width // 2), "bias": (2, width // 2)}
    inner = {
        part: {name: node[part][name].reshape(shape) for name, shape in heads.items()}
        for part in ("query", "key", "value")
    }
    kernel = node["out"]["kernel"].reshape(2, width // 2, width)
    inner["out"] = {"kernel": kernel, "bias": node["out"]["bias"]}
    layer = nn.MultiHeadDotProductAttention(num_heads=2)
    return layer.apply({"params": inner}, x, context, mask=mask)
