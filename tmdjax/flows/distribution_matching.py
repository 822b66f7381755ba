"""Distribution matching: a generator follows the difference of two scores.

One score is a teacher's, the other that of a critic which is trained on what the
generator makes ("fake score"); where they agree at all noise levels, the generator's
law is the teacher's. An adversarial term on features may stand beside it.

All predictions are of data (x0 = x_t - t v), all losses one number an example.

References:
    DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867; variational score distillation,
    arXiv 2305.16213.
"""

import jax
import jax.numpy as jnp

from tmdjax.core.checks import check_choice, check_range, check_same_shape
from tmdjax.core.types import Array, Data, Float, PerExample

NORMALISATIONS = ("distance", "difference")


def distribution_matching_loss(
    x: Data,
    teacher: Data,
    critic: Data,
    *,
    normalisation: str = "distance",
    epsilon: float = 1e-6,
) -> tuple[PerExample, dict[str, Array]]:
    """A loss whose gradient with respect to x is w (critic - teacher) / numel.

    Args:
        x: what the generator made, [batch, *event]; the gradient flows into it alone.
        teacher: the teacher's prediction of x from its noised state, with guidance.
        critic: the critic's prediction from the same state.
        normalisation: w = 1 / (mean |x - teacher| + epsilon) an example for
            'distance', which is what DMD, DMD2 and their code do; 1 / (mean
            |critic - teacher| + epsilon) for 'difference' (arXiv 2601.09881,
            appendix A.3, its 1-norm read as a mean): the gradient then keeps its
            size however near the two scores are.
        epsilon: > 0, keeps w finite.

    Returns:
        loss [batch], and metrics [batch]: 'weight' w and 'score_difference', the mean
        of |critic - teacher|.

    Raises:
        ValueError: shapes that differ, an unknown normalisation, epsilon <= 0.

    References:
        DMD, arXiv 2311.18828, eq. 7 and 8.
    """
    check_choice("normalisation", normalisation, NORMALISATIONS)
    check_range("epsilon", epsilon, 0, open_low=True)
    check_same_shape("teacher", teacher, "x", x)
    check_same_shape("critic", critic, "x", x)
    axes = tuple(range(1, x.ndim))
    x = x.astype(jnp.float32)
    difference = critic.astype(jnp.float32) - teacher.astype(jnp.float32)
    distance = jnp.mean(jnp.abs(x - teacher), axes)
    apart = jnp.mean(jnp.abs(difference), axes)
    weight = 1 / ((distance if normalisation == "distance" else apart) + epsilon)
    gradient = difference * weight.reshape((-1,) + (1,) * len(axes))
    target = jax.lax.stop_gradient(x - gradient)
    loss = 0.5 * jnp.mean(jnp.square(x - target), axes)
    metrics = {"weight": weight, "score_difference": apart}
    return loss, jax.tree.map(jax.lax.stop_gradient, metrics)


def generator_loss(logits: Float[Array, "batch head"]) -> PerExample:
    """softplus(-D), mean over heads: ln 2 where D = 0 (the non-saturating loss).

    References:
        Goodfellow et al., arXiv 1406.2661, sec. 3.
    """
    return jnp.mean(jax.nn.softplus(-logits), -1)


def discriminator_loss(
    fake: Float[Array, "batch head"], real: Float[Array, "batch head"]
) -> PerExample:
    """softplus(D(fake)) + softplus(-D(real)), mean over heads: 2 ln 2 where D = 0.

    Raises:
        ValueError: shapes that differ.
    """
    check_same_shape("fake", fake, "real", real)
    return jnp.mean(jax.nn.softplus(fake) + jax.nn.softplus(-real), -1)


def approximate_r1(
    logits: Float[Array, "batch head"], perturbed: Float[Array, "batch head"]
) -> PerExample:
    """(D(x) - D(x + sigma z))^2, mean over heads: a gradient penalty without gradient.

    Args:
        logits: of real samples.
        perturbed: of the same with small Gaussian noise added.

    References:
        APT, arXiv 2501.08316, approximated R1.
    """
    check_same_shape("perturbed", perturbed, "logits", logits)
    return jnp.mean(jnp.square(logits - perturbed), -1)


def denoising_loss(prediction: Data, x: Data) -> PerExample:
    """Mean squared error of a prediction of data: how the critic learns x's law."""
    check_same_shape("prediction", prediction, "x", x)
    error = prediction - jax.lax.stop_gradient(x)
    return jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
