"""PDE-Refiner: a neural solver that predicts a step, then repairs ever smaller parts.

One network is called K + 1 times a step: at level K it predicts the step from scratch,
at levels K - 1 to 0 it removes noise of variance beta_k = min_variance^((K - k) / K)
from that prediction. Solvers of one call, and rollouts of both, stand in
:mod:`tmdjax.train.neural_solvers`.

Levels count as in the code, from the least noise: k = K is the first call. The paper
counts calls (:func:`paper_level`). A network is
``(params, x, t, cond) -> answer [batch, *space, channel]``, where x has the channels of
the history, oldest first, and then those of the noised answer, t = k / K, and cond is
float [batch, n] or None. States are float32.

References:
    Lippe et al. 2023, arXiv 2308.05732; its code in PDEArena.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from tmdjax import flows
from tmdjax.core import prng
from tmdjax.core.checks import (
    check_batch,
    check_choice,
    check_count,
    check_fields,
    check_range,
)
from tmdjax.core.conventions import time_like
from tmdjax.core.types import ApplyFn, Array, Params, PerExample, SampleKeys
from tmdjax.train.neural_solvers import (
    answer_of,
    ask,
    check_solver,
    next_state,
    squared,
    states_of,
)

VARIANTS = ("reference", "paper")
INITIAL_INPUTS = ("noise", "zeros")
SCHEDULES = ("exponential", "cosine")
_PUBLISHED: dict[str, dict[str, Any]] = {
    "pde_refiner": {
        "refinements": 3,
        "min_variance": 4e-7,
        "difference_weight": 0.3,
    }
}
PRESETS = tuple(_PUBLISHED)


@dataclasses.dataclass(frozen=True)
class PDERefiner:
    """How a step is refined; the schedule is part of the trained model.

    Attributes:
        refinements: K, at least 1 (0 with ``allow_no_refinement``: one call, a
            regression).
        min_variance: noise of level 0, in (0, 1): a variance, though the code calls it
            min_noise_std. Choose it on validation data, not far below the squared error
            that the network reaches in one step, in units of the answer. The cosine
            schedule has levels of its own, and no use for it.
        difference_weight: d, > 0: the network answers (next - last state) / d. None:
            it answers the next state.
        history: states that it is given, at least 1.
        initial_input: what stands for the noised answer in the first call: 'noise', as
            in the code, or 'zeros', as in the paper.
        variant: 'reference', v-prediction and ancestral steps of a process that keeps
            the variance; 'paper', noise that is added to the prediction and predicted.
        schedule: 'exponential', or 'cosine', that of image models, which does not
            repair small parts (a control, of 'reference' alone).
        allow_no_refinement: lets ``refinements`` be 0.

    Raises:
        TypeError, ValueError: a setting out of range, naming it.
    """

    refinements: int = 3
    min_variance: float = 4e-7
    difference_weight: float | None = 0.3
    history: int = 1
    initial_input: str = "noise"
    variant: str = "reference"
    schedule: str = "exponential"
    allow_no_refinement: bool = False

    def __post_init__(self) -> None:
        low = 0 if self.allow_no_refinement else 1
        check_count("refinements", self.refinements, low)
        check_range(
            "min_variance", self.min_variance, 0, 1, open_low=True, open_high=True
        )
        check_solver(self.difference_weight, self.history)
        check_choice("initial_input", self.initial_input, INITIAL_INPUTS)
        check_choice("variant", self.variant, VARIANTS)
        check_choice("schedule", self.schedule, SCHEDULES)
        if self.schedule == "cosine" and self.variant == "paper":
            raise ValueError(
                "schedule='cosine' is of variant='reference'; 'paper' adds noise of "
                "exponential levels."
            )
        if self.min_variance < 1e-9:
            warnings.warn(
                f"min_variance={self.min_variance:g} is below the resolution of states "
                f"in float32 (1e-9, a deviation of 3e-5); use a larger one.",
                stacklevel=3,
            )

    @property
    def window(self) -> int:
        """Successive states of an example to train on."""
        return self.history + 1

    def noise_schedule(self) -> flows.DiffusionSchedule:
        """The levels, float64 on the host; K + 1 of them."""
        if not self.refinements:
            return flows.DiffusionSchedule(np.ones(1))
        if self.schedule == "cosine":
            return flows.cosine_schedule(self.refinements + 1)
        return flows.exponential_schedule(self.refinements, self.min_variance)

    def columns(self) -> dict[str, np.ndarray]:
        """What loss and steps need of each level, float64 [level], level 0 first.

        't' for the network; the input x = data y + noise e of an answer y and normal e;
        the target = to_noise e + to_data y; the answer = keep_x x + take value that a
        network's value stands for; and the next input
        from_data answer + from_x x + std e. Roots are taken here: in float32
        1 - abar of small levels would be wrong by per cents.
        """
        schedule = self.noise_schedule()
        found, last = schedule.columns(), len(schedule) - 1
        level = np.arange(last + 1)
        found["t"] = level / last if last else np.ones(1)
        if self.variant == "reference":
            found |= {"to_noise": found["data"], "to_data": -found["noise"]}
            return found | {"keep_x": found["data"], "take": -found["noise"]}
        std, first = np.sqrt(schedule.beta), level == last
        one = np.where(first, 0.0, 1.0)
        return found | {
            **{"data": one, "noise": std, "to_noise": one, "to_data": 1 - one},
            **{"keep_x": one, "take": np.where(first, 1.0, -std)},
            **{"from_data": np.ones(last + 1), "from_x": np.zeros(last + 1)},
            "std": np.append(0.0, std[:-1]),
        }

    def rows(self, levels: Any) -> dict[str, Array]:
        """Columns of levels (int, any shape, or a slice), float32."""
        names = {**self.columns(), "step": np.arange(self.refinements + 1)[::-1]}
        integers = ("level", "step")
        return {
            name: jnp.asarray(c, jnp.int32 if name in integers else jnp.float32)[levels]
            for name, c in names.items()
        }

    def loss(
        self,
        params: Params,
        apply_fn: ApplyFn,
        batch: Mapping[str, Any],
        keys: SampleKeys,
        *,
        level: Any = None,
        noise: Any = None,
    ) -> PerExample:
        """Squared error of the answer at a random level, each with equal probability.

        Args:
            params: nested dict handed to apply_fn.
            apply_fn: the network.
            batch: 'states' float32 [batch, history + 1, *space, channel]; 'cond',
                of :func:`tmdjax.data.pde.conditions` say, where the network has some.
            keys: [batch]; level and noise are drawn from them.
            level: int [batch] in 0..K, instead of the drawn ones.
            noise: [batch, *space, channel], instead of the drawn one.

        Returns:
            [batch]: the sum over channels, the mean over space.

        Raises:
            TypeError: states or answers of 16 bits.
            ValueError: another number of states, an answer or a noise of another shape,
                or a (concrete) level outside 0..K.
        """
        states = states_of(batch["states"], self.window)
        history, y = states[:, :-1], answer_of(states, self.difference_weight)
        keys = prng.split(keys)
        if level is None:
            draw = jax.vmap(
                lambda k: jax.random.randint(k, (), 0, self.refinements + 1)
            )
            level = draw(keys[:, 0])
        else:
            check_batch("level", level, len(y))
            if not isinstance(level, jax.core.Tracer):
                check_range("level", int(np.min(level)), 0, self.refinements)
                check_range("level", int(np.max(level)), 0, self.refinements)
        if noise is None:
            noise = prng.normal(keys[:, 1], y.shape[1:])
        row = self.rows(level)
        noise = jnp.asarray(noise)
        x = flows.diffuse(y, noise, row)
        if self.initial_input == "zeros":
            x = jnp.where(time_like(row["level"], x) == self.refinements, 0, x)
        to_noise, to_data = (time_like(row[n], y) for n in ("to_noise", "to_data"))
        value = ask(apply_fn, params, history, x, row["t"], batch.get("cond"))
        return squared(value - (to_noise * noise + to_data * y))

    def step(
        self,
        params: Params,
        apply_fn: ApplyFn,
        history: Any,
        keys: SampleKeys,
        cond: Any = None,
        *,
        noise: Any = None,
    ) -> Array:
        """The next state, by K + 1 calls of the network in one scan.

        Args:
            params: nested dict handed to apply_fn; averaged ones, as published.
            apply_fn: the network.
            history: float32 [batch, history, *space, channel], the last state last.
            keys: [batch].
            cond: float [batch, n], or None.
            noise: [K + 1, batch, *space, channel], instead of keys: that of the first
                call's input, then what each call but the last adds.

        Returns:
            [batch, *space, channel].

        Raises:
            TypeError: states or answers of 16 bits.
            ValueError: another number of states, or an answer or a noise of another
                shape.
        """
        history = states_of(history, self.history)
        shape = history.shape[2:]
        if noise is not None:
            wanted = (self.refinements + 1, len(history), *shape)
            if np.shape(noise) != wanted:
                raise ValueError(
                    f"noise has shape {np.shape(noise)}; refinements="
                    f"{self.refinements} take {wanted}: one for the first input, then "
                    f"one for each call but the last."
                )

        def draw(step: Any) -> Array:
            if noise is not None:
                return jnp.asarray(noise)[step]
            return prng.normal(prng.fold_in(keys, step), shape)

        x = draw(0)
        if self.initial_input == "zeros":
            x = jnp.zeros_like(x)

        def refine(x: Array, row: dict[str, Array]) -> tuple[Array, None]:
            t = jnp.full(len(x), row["t"])
            value = ask(apply_fn, params, history, x, t, cond)
            answer = row["keep_x"] * x + row["take"] * value
            mean = row["from_data"] * answer + row["from_x"] * x
            # the last call adds nothing, and draws what nobody sees
            step = jnp.minimum(row["step"] + 1, self.refinements)
            return mean + row["std"] * draw(step), None

        x, _ = jax.lax.scan(refine, x, self.rows(slice(None, None, -1)))
        return next_state(history, x, self.difference_weight)


def preset(name: str = "pde_refiner", **changes: Any) -> PDERefiner:
    """Published settings, with changes.

    Args:
        name: 'pde_refiner', the code's configuration of Kuramoto-Sivashinsky, the only
            one that is published.
        **changes: fields of :class:`PDERefiner`.

    Raises:
        ValueError: an unknown name, or a setting out of range.
        TypeError: an unknown field.
    """
    check_choice("preset", name, PRESETS)
    check_fields(PDERefiner, changes)
    return PDERefiner(**_PUBLISHED[name] | changes)


def paper_level(level: int, refinements: int) -> int:
    """The paper's number of a level, and back: it counts calls, 0 the first."""
    check_range("level", check_count("level", level, 0), 0, refinements)
    return refinements - level
