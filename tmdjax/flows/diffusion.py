"""Variance-preserving diffusion: noise schedules, training targets, ancestral steps.

    x_k = sqrt(abar_k) x_data + sqrt(1 - abar_k) e,    abar_k = prod_j<=k (1 - beta_j)

Levels k count from 0, the least noise, to the last one, the most. A schedule lives on
the host in float64; only square roots and weights reach a device, in float32: there
1 - abar_k of small noise would be off by per cents.

References:
    DDPM, arXiv 2006.11239. The cosine schedule: arXiv 2102.09672, eq. 17. v-prediction:
    arXiv 2202.00512, appendix D. Exponential levels: PDE-Refiner, arXiv 2308.05732.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core import prng
from tmdjax.core.checks import check_choice, check_count, check_output, check_range
from tmdjax.core.conventions import time_like
from tmdjax.core.types import ApplyFn, Array, Cond, Data, Params, PerExample, SampleKeys

PREDICTIONS = ("noise", "data", "v")
"""What a network says of x_k: e, x_data, or v = sqrt(abar) e - sqrt(1 - abar) x_data
(which is not the velocity of the linear path)."""


@dataclasses.dataclass(frozen=True, eq=False)
class DiffusionSchedule:
    """Noise levels, float64 on the host, [level] each.

    Attributes:
        beta: variance that a level adds, in (0, 1]; it may be 1 in the last level.
    """

    beta: np.ndarray

    def __post_init__(self) -> None:
        beta = np.array(self.beta, np.float64)
        if beta.ndim != 1 or not beta.size:
            raise ValueError(f"beta has shape {beta.shape}; give one number a level.")
        bad = np.flatnonzero(~((beta > 0) & (beta <= 1)))
        early = np.flatnonzero(beta[:-1] == 1)
        if bad.size or early.size:
            k = int((bad if bad.size else early)[0])
            raise ValueError(
                f"beta[{k}]={beta[k]} of {beta.size} levels; a level adds a variance "
                f"in (0, 1), and the last one may have 1: nothing is left after it."
            )
        object.__setattr__(self, "beta", beta)

    def __len__(self) -> int:
        return len(self.beta)

    @property
    def log_alpha_bar(self) -> np.ndarray:
        """The logarithm of abar, the share of variance that is data."""
        with np.errstate(divide="ignore"):
            return np.cumsum(np.log1p(-self.beta))

    @property
    def alpha_bar(self) -> np.ndarray:
        """The share of the variance that is data, decreasing."""
        return np.exp(self.log_alpha_bar)

    @property
    def noise_variance(self) -> np.ndarray:
        """1 - abar, without the rounding of the difference."""
        return -np.expm1(self.log_alpha_bar)

    def columns(self) -> dict[str, np.ndarray]:
        """What steps need of each level, float64 [level], level 0 first.

        'level' (int) and 't' = (level + 1) / levels, in (0, 1], for the network; 'data'
        and 'noise', the square roots of abar and 1 - abar; and of the Gaussian
        q(x_{k-1} | x_k, x_data) of an ancestral step: weights 'from_data' and 'from_x'
        of its mean, and 'std', 0 in level 0.
        """
        beta, noise = self.beta, self.noise_variance
        before = np.append(0.0, noise[:-1])  # 1 - abar of the next level down
        data_before = np.append(1.0, self.alpha_bar[:-1])
        level = np.arange(len(beta))
        return {
            "level": level,
            "t": (level + 1) / len(beta),
            "data": np.sqrt(self.alpha_bar),
            "noise": np.sqrt(noise),
            "from_data": np.sqrt(data_before) * beta / noise,
            "from_x": np.sqrt(1 - beta) * before / noise,
            "std": np.sqrt(before / noise * beta),
        }

    def rows(self, levels: Any, dtype: Any = jnp.float32) -> dict[str, Array]:
        """Columns of the given levels, floats in a dtype; 'step' counts from the top.

        Args:
            levels: int, any shape; ``slice(None, None, -1)`` is a whole walk.
            dtype: of the numbers; 'level' and 'step' are int32.
        """
        columns = self.columns() | {"step": np.arange(len(self))[::-1]}
        integers = ("level", "step")
        return {
            name: jnp.asarray(c, jnp.int32 if name in integers else dtype)[levels]
            for name, c in columns.items()
        }


def linear_schedule(
    levels: int, first: float = 1e-4, last: float = 0.02
) -> DiffusionSchedule:
    """Variances that rise linearly, as in DDPM with 1000 levels.

    Args:
        levels: at least 1.
        first: beta of level 0, in (0, 1).
        last: beta of the last level, in [first, 1).

    Raises:
        TypeError, ValueError: a number out of range.
    """
    check_count("levels", levels)
    check_range("first", first, 0, 1, open_low=True, open_high=True)
    check_range("last", last, first, 1, open_high=True)
    return DiffusionSchedule(np.linspace(first, last, levels))


def cosine_schedule(
    levels: int, offset: float = 0.008, max_beta: float = 0.999
) -> DiffusionSchedule:
    """Levels whose abar falls like a squared cosine.

    Args:
        levels: at least 1.
        offset: keeps the first variances from vanishing, > 0.
        max_beta: of a level, in (0, 1).

    Raises:
        TypeError, ValueError: a number out of range.

    References:
        arXiv 2102.09672, eq. 17.
    """
    check_count("levels", levels)
    check_range("offset", offset, 0, open_low=True)
    check_range("max_beta", max_beta, 0, 1, open_low=True, open_high=True)
    t = np.linspace(0, 1, levels + 1)
    alpha_bar = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
    return DiffusionSchedule(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta))


def exponential_schedule(refinements: int, min_variance: float) -> DiffusionSchedule:
    """Levels from pure noise down to min_variance in equal factors.

        beta_k = min_variance^((K - k) / K),    k = 0, ..., K

    Args:
        refinements: K, at least 1; there are K + 1 levels, the last of pure noise.
        min_variance: noise of level 0, in (0, 1): a variance, of which the square root
            is the standard deviation.

    Raises:
        TypeError, ValueError: a number out of range.

    References:
        PDE-Refiner, arXiv 2308.05732 (its code calls the variance 'min_noise_std').
    """
    count = check_count("refinements", refinements)
    check_range("min_variance", min_variance, 0, 1, open_low=True, open_high=True)
    return DiffusionSchedule(min_variance ** (1 - np.arange(count + 1) / count))


def diffuse(x_data: Data, noise: Data, row: Mapping[str, Array]) -> Data:
    """Data at a noise level, sqrt(abar) x_data + sqrt(1 - abar) noise.

    Args:
        x_data: [batch, *event].
        noise: standard normal, [batch, *event].
        row: columns of :meth:`DiffusionSchedule.rows`, [batch] or scalars.

    Returns:
        [batch, *event].
    """
    check_output(noise, x_data, "the noise")
    data, share = time_like(row["data"], x_data), time_like(row["noise"], x_data)
    return data * x_data + share * noise


def diffusion_target(
    x_data: Data, noise: Data, row: Mapping[str, Array], prediction: str = "noise"
) -> Data:
    """What a network should say of :func:`diffuse`'s state, [batch, *event].

    Args:
        x_data: [batch, *event].
        noise: [batch, *event].
        row: columns [batch] or scalars.
        prediction: one of PREDICTIONS.

    Raises:
        ValueError: an unknown prediction.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    if prediction != "v":
        return noise if prediction == "noise" else x_data
    data, share = time_like(row["data"], x_data), time_like(row["noise"], x_data)
    return data * noise - share * x_data


def predicted_data(
    value: Data, x: Data, row: Mapping[str, Array], prediction: str = "noise"
) -> Data:
    """The data that a network's answer at a state x stands for.

    Args:
        value: the network's answer, [batch, *event].
        x: the state it was asked about, [batch, *event].
        row: columns [batch] or scalars.
        prediction: what the answer is, one of PREDICTIONS; 'noise' says nothing of the
            data in a level of pure noise, where abar is 0.

    Returns:
        [batch, *event].

    Raises:
        TypeError: the answer is not an array of floats.
        ValueError: an unknown prediction, or an answer of another shape than x.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    check_output(value, x, f"the prediction ({prediction})")
    data, noise = time_like(row["data"], x), time_like(row["noise"], x)
    if prediction == "noise":
        return (x - noise * value) / data
    return value if prediction == "data" else data * x - noise * value


def ancestral_step(
    value: Data,
    x: Data,
    row: Mapping[str, Array],
    prediction: str = "noise",
    *,
    clip_data: float | None = None,
) -> tuple[Data, Array]:
    """The Gaussian q(x_{k-1} | x_k, x_data) at the data that a network predicts.

    Args:
        value: the network's answer at x, [batch, *event].
        x: the state of level k, [batch, *event].
        row: columns of level k, [batch] or scalars.
        prediction: what the answer is, one of PREDICTIONS.
        clip_data: the predicted data are clipped to +-clip_data; None leaves them.

    Returns:
        Mean [batch, *event] and standard deviation ([batch] or a scalar); in level 0
        the data themselves, with deviation 0.

    Raises:
        TypeError, ValueError: what :func:`predicted_data` refuses.

    References:
        DDPM, arXiv 2006.11239, eqs. 6 and 7.
    """
    x_data = predicted_data(value, x, row, prediction)
    if clip_data is not None:
        x_data = jnp.clip(x_data, -clip_data, clip_data)
    from_data, from_x = (time_like(row[n], x) for n in ("from_data", "from_x"))
    return from_data * x_data + from_x * x, row["std"]


def diffusion_loss(
    params: Params,
    apply_fn: ApplyFn,
    x_data: Data,
    keys: SampleKeys,
    cond: Cond = None,
    *,
    schedule: DiffusionSchedule,
    prediction: str = "noise",
) -> PerExample:
    """Mean squared error of a network's prediction at a random level, per example.

    Args:
        params: nested dict handed to apply_fn.
        apply_fn: ``(params, x, t, cond) -> prediction`` [batch, *event], with t [batch]
            = (level + 1) / levels in (0, 1].
        x_data: [batch, *event] float32.
        keys: [batch] typed keys: level and noise are drawn from them.
        cond: conditions of the batch, or None.
        schedule: its levels are drawn with equal probability.
        prediction: one of PREDICTIONS.

    Returns:
        [batch], the mean over event dimensions.

    Raises:
        TypeError, ValueError: an unknown prediction, or a network's output of another
            kind or shape than x_data.
    """
    keys = prng.split(keys)
    draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(schedule)))
    row = schedule.rows(draw(keys[:, 0]), x_data.dtype)
    noise = prng.normal(keys[:, 1], x_data.shape[1:], x_data.dtype)
    target = diffusion_target(x_data, noise, row, prediction)
    value = apply_fn(params, diffuse(x_data, noise, row), row["t"], cond)
    error = check_output(value, x_data, f"the prediction ({prediction})") - target
    return jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
