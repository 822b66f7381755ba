"""Networks as users compile them: the memory of the compiled program."""

import jax
import jax.numpy as jnp

from tmdjax import models
from tmdjax.core import trees


def test_a_part_of_the_stack_copies_no_weights():
    """The slice of the weights would be the largest buffer."""
    module = models.DiT(patch_size=2, hidden=64, depth=6, heads=2)
    apply_fn = models.functional(module)
    x, t = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32), jnp.float32(0.5)
    params = jax.eval_shape(lambda: models.init_params(module, jax.random.key(0), x, t))
    h, c = jax.eval_shape(lambda p, x: apply_fn(p, x, t, method="embed"), params, x)

    def temporary(stop):
        def loss(params, h, c):
            out, _ = apply_fn(params, h, c, method="blocks", stop=stop)
            return jnp.square(out).mean()

        lowered = jax.jit(jax.grad(loss)).lower(params, h, c)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    one_layer = trees.nbytes(params["blocks"]) / 6
    assert temporary(5) < temporary(6) + 2 * one_layer


def test_the_cache_of_a_decoder_is_updated_in_place():
    config = models.DecoderConfig(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_layers=3, num_heads=4,
        num_kv_heads=2, head_dim=6, qk_norm=True,
    )  # fmt: skip
    slots, length = 8, 256

    def generate(params, cache, tokens):
        def body(carry, step):
            cache, tokens = carry
            at = jnp.full(slots, step)
            logits, cache = models.decode(config, params, cache, tokens, at)
            return (cache, logits.argmax(-1).astype(jnp.int32)), None

        return jax.lax.scan(body, (cache, tokens), jnp.arange(16))[0]

    params, cache = jax.eval_shape(
        lambda: (
            models.init_params(
                models.Decoder(config), jax.random.key(0), jnp.zeros((1, 1), int)
            ),
            models.init_cache(config, slots, length),
        )
    )
    tokens = jax.ShapeDtypeStruct((slots,), jnp.int32)
    compiled = jax.jit(generate, donate_argnums=1).lower(params, cache, tokens)
    memory = compiled.compile().memory_analysis()
    one_layer = trees.nbytes(cache) / config.num_layers
    assert memory.alias_size_in_bytes >= trees.nbytes(cache)
    # one layer's keys and values, laid out for the product, and scores
    assert memory.temp_size_in_bytes < 2.2 * one_layer, memory
