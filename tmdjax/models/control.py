"""Small networks of control: observation to action, value, or velocity of an action."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tmdjax import flows
from tmdjax.core.checks import check_choice, check_count, check_range
from tmdjax.core.types import Array, Params
from tmdjax.models.layers import Dense, patchify
from tmdjax.quant import as_recipe

ACTIVATIONS = {
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
    "silu": nn.silu,
    "elu": nn.elu,
    "relu": nn.relu,
    "tanh": jnp.tanh,
}


def _out_init(scale: float) -> Any:
    if scale == 0:
        return nn.initializers.zeros
    return nn.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")


def _check(hidden: Any, activation: str) -> None:
    for width in hidden:
        check_count("hidden", width)
    if not hidden:
        raise ValueError("hidden=() has no layer; give at least one width.")
    check_choice("activation", activation, ACTIVATIONS)


class ObservationFeatures(nn.Module):
    """Vectors as they are; images by a layer over patches and one over all of them.

    A patch is 8 pixels wide, which divides the image's sides, and gives 16 features.

    Attributes:
        recipe: GEMM recipe, or its name.
    """

    recipe: Any = "fp32"

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        """Float vectors [batch, n] as they are; of uint8 images [batch, 128]."""
        if observation.ndim == 2:
            return observation
        if observation.dtype != jnp.uint8 or observation.ndim != 4:
            raise TypeError(
                f"an observation is {observation.dtype} {observation.shape}; give "
                f"float32 [batch, feature] or uint8 [batch, height, width, channel]."
            )
        patches = patchify(observation.astype(jnp.float32) / 127.5 - 1, 8)
        h = nn.relu(Dense(16, self.recipe, name="patch")(patches))
        h = h.reshape(h.shape[0], -1)
        return nn.relu(Dense(128, self.recipe, name="image")(h))


class ControlMLP(nn.Module):
    """Observation to a vector: the mean of a Gaussian policy, or a value.

    Attributes:
        features: size of the output.
        hidden: widths of the hidden layers.
        activation: one of ACTIVATIONS.
        out_scale: standard deviation of the output at the start, about; 0 for zeros.
        recipe: GEMM recipe, or its name.
    """

    features: int
    hidden: tuple[int, ...] = (256, 128, 64)
    activation: str = "mish"
    out_scale: float = 1.0
    recipe: Any = "fp32"

    def __post_init__(self):
        _check(self.hidden, self.activation)
        self.recipe = as_recipe(self.recipe)
        super().__post_init__()

    @nn.compact
    def __call__(self, observation: Array) -> Array:
        """float32 [batch, features]."""
        act = ACTIVATIONS[self.activation]
        h = ObservationFeatures(recipe=self.recipe, name="observation")(observation)
        for i, width in enumerate(self.hidden):
            h = act(Dense(width, self.recipe, name=f"hidden_{i}")(h))
        init = _out_init(self.out_scale)
        out = Dense(self.features, self.recipe, name="out", kernel_init=init)
        return out(h).astype(jnp.float32)


class ControlVelocity(nn.Module):
    """Velocity (x, t, observation) -> v of an action's flow.

    The first layer is linear in x, in what stands for t and in the observation; what
    the observation adds is computed once an action (:meth:`embed`), not once an ODE
    step.

    Attributes:
        action_size: of x.
        hidden: widths of the hidden layers.
        activation: one of ACTIVATIONS.
        frequencies: lowest and highest angular frequency of the sinusoids, and how many
            (in geometric steps).
        out_scale: of the output's kernel at the start; 0 for zeros.
        output_scale: what the output is multiplied by.
        recipe: GEMM recipe, or its name; of an 8-bit one, the layers between the first
            and the last are quantised (:attr:`tmdjax.quant.Recipe.unquantised`).
        residual: layers after the first come in pairs, each adding
            ``second(act(first(act(h))))`` to h: an odd number of equal widths.
        time_hidden: width of the first of two layers that the sinusoids of t pass
            before they enter; None leaves both out.
        step_size: it also takes the length of the step that it is to make.

    References:
        ReinFlow, arXiv 2505.22094: residual, time_hidden=32 and activation 'relu' are
        its networks; with a step size, those of shortcut models, arXiv 2410.12557.
    """

    action_size: int
    hidden: tuple[int, ...] = (256, 128, 64)
    activation: str = "mish"
    frequencies: tuple[float, float, int] = (1.0, 100.0, 32)
    out_scale: float = 0.01
    output_scale: float = 1.0
    recipe: Any = "fp32"
    residual: bool = False
    time_hidden: int | None = None
    step_size: bool = False

    def __post_init__(self):
        _check(self.hidden, self.activation)
        if self.residual and (len(self.hidden) % 2 == 0 or len({*self.hidden}) > 1):
            raise ValueError(
                f"hidden={self.hidden} of a residual network: give an odd number of "
                f"equal widths, a first layer and pairs that add to it."
            )
        if self.time_hidden is not None:
            check_count("time_hidden", self.time_hidden)
        self.recipe = as_recipe(self.recipe)
        low, high, count = self.frequencies
        check_count("frequencies, how many", count)
        check_range("frequencies, lowest", low, 0, high, open_low=True)
        super().__post_init__()

    def setup(self):
        """The layers."""
        (first, *rest), wide = self.hidden, self.recipe.unquantised
        self.observation = ObservationFeatures(recipe=wide)
        self.from_observation = Dense(first, wide)
        self.from_action = Dense(first, wide, use_bias=False)
        self.from_time = Dense(first, wide, use_bias=False)
        self.layers = [Dense(width, self.recipe) for width in rest]
        init = _out_init(self.out_scale)
        self.out = Dense(self.action_size, wide, kernel_init=init)
        if self.time_hidden is not None:
            self.time_in = Dense(self.time_hidden, wide)
            self.time_out = Dense(2 * self.frequencies[2], wide)

    def features(self, observation: Array) -> Array:
        """An observation as a vector, [batch, n]."""
        return self.observation(observation)

    def embed(self, observation: Array) -> Array:
        """What an observation adds to the first layer, [batch, hidden[0]]."""
        return self.from_observation(self.features(observation))

    def time(self, t: Array, step_size: Any = None) -> Array:
        """What stands for a time (and the step's length), [batch, n].

        Args:
            t: [batch]; 1 is noise, 0 the action.
            step_size: [batch] or a number in [0, 1], of a network that takes it.

        Raises:
            ValueError: a step size is lacking, or given to a network without one.
        """
        if (step_size is None) == self.step_size:
            raise ValueError(
                f"step_size={step_size} for a network with step_size={self.step_size}; "
                f"give it to such a network, and to no other."
            )
        given = [t]
        if step_size is not None:
            given.append(jnp.broadcast_to(jnp.asarray(step_size, t.dtype), t.shape))
        waves = jnp.asarray(np.geomspace(*self.frequencies), jnp.float32)
        sinusoids = []
        for number in given:
            angles = number[:, None] * waves
            sinusoids += [jnp.cos(angles), jnp.sin(angles)]
        time = jnp.concatenate(sinusoids, -1)
        if self.time_hidden is None:
            return time
        return self.time_out(ACTIVATIONS["mish"](self.time_in(time)))

    def velocity(
        self, x: Array, t: Array, embedded: Array, step_size: Any = None
    ) -> Array:
        """float32 [batch, action_size].

        Args:
            x: [batch, action_size].
            t: [batch], or [1] where all have one time; 1 is noise, 0 the action.
            embedded: of the observation, from :meth:`embed`.
            step_size: length of the step, [batch] or a number in [0, 1], of a network
                that takes it; None for others.
        """
        act = ACTIVATIONS[self.activation]
        h = self.from_action(x) + self.from_time(self.time(t, step_size)) + embedded
        if self.residual:
            for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
                h = h + second(act(first(act(h))))
        else:
            h = act(h)
            for layer in self.layers:
                h = act(layer(h))
        return self.output_scale * self.out(h).astype(jnp.float32)

    def __call__(
        self, x: Array, t: Array, observation: Array, step_size: Any = None
    ) -> Array:
        """float32 [batch, action_size]: :meth:`velocity` of an embedded observation."""
        return self.velocity(x, t, self.embed(observation), step_size)


class FineTunedVelocity(nn.Module):
    """A :class:`ControlVelocity` of which the later steps were fine-tuned.

    Its parameters are 'network', the fine-tuned ones, and 'base', those before.

    Attributes:
        of: the network.
        time: 'network' answers at times up to it, 'base' above.
    """

    of: ControlVelocity
    time: float

    def setup(self):
        """The network twice."""
        self.network, self.base = self.of.clone(), self.of.clone()

    def __call__(
        self, x: Array, t: Array, observation: Array, step_size: Any = None
    ) -> Array:
        """float32 [batch, action_size]; both networks are evaluated."""
        given = x, t, observation, step_size
        tuned = (t <= self.time)[:, None]
        return jnp.where(tuned, self.network(*given), self.base(*given))


def solve_action(
    apply_fn: Callable[..., Any],
    params: Params,
    observation: Array,
    noise: Array,
    *,
    steps: int,
    solver: str,
) -> Array:
    """Where the flow of a :class:`ControlVelocity` takes noise: the action.

    Args:
        apply_fn: its function, from :func:`tmdjax.models.functional`.
        params: its parameters.
        observation: [batch, ...].
        noise: [batch, action_size], at t = 1.
        steps: of the solver, equally long.
        solver: 'euler', 'midpoint' and so on, see :func:`tmdjax.flows.rollout`.

    Returns:
        float32 [batch, action_size], at t = 0.
    """

    def velocity(x: Array, t: Array, embedded: Array) -> Array:
        # one time for all: what it adds to the first layer is computed once
        return apply_fn(params, x, t[:1], embedded, method="velocity")

    return flows.rollout(
        None,
        velocity,
        noise,
        flows.make_table("ode", flows.uniform_grid(steps)),
        apply_fn(params, observation, method="embed"),
        method=solver,
        store=False,
        unroll=10,
    )
