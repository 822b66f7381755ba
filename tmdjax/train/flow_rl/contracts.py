"""What plugs into RL on flow models: policy, method, reward, objective.

What differs between methods is how samples are drawn and how rewards become the
advantages of single transitions; a :class:`FlowMethod` says both.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax import flows, rl
from tmdjax.core import prng, trees
from tmdjax.core.checks import check_choice, check_count, check_fields, check_range
from tmdjax.core.types import Array, Cond, Params, PyTree, Velocity
from tmdjax.quant import Precision


class Policy(NamedTuple):
    """A flow model as RL sees it: what is trained, and what is held constant.

    Attributes:
        velocity: ``(params, frozen) -> velocity(x, t, cond)`` with its guidance, as
            updates compute it.
        reference: ``frozen -> velocity`` that the KL refers to, or None.
        condition: ``(frozen, batch) -> cond`` [prompt, ...], such as the encoding of a
            text, or [prompt * group_size, ...] where each sample has its own; computed
            once for the rollout and once for the update.
        frozen: arrays that no update changes (a base under adapters, an encoder).
        rollout_velocity: the same under another recipe, as rollouts compute it: its
            log-probs are the behaviour's. None where that is ``velocity`` itself.
        precision: the recipes of both, for what a failing check of the ratio says.
    """

    velocity: Callable[[Params, PyTree], Velocity]
    reference: Callable[[PyTree], Velocity] | None = None
    condition: Callable[[PyTree, Any], Cond] = lambda frozen, batch: None
    frozen: PyTree = ()
    rollout_velocity: Callable[[Params, PyTree], Velocity] | None = None
    precision: Precision | None = None

    @property
    def acting(self) -> Callable[[Params, PyTree], Velocity]:
        """What samples: ``(params, frozen) -> velocity``."""
        return self.rollout_velocity or self.velocity


class Samples(NamedTuple):
    """Which samples a rollout draws; those of a group stand in a row.

    A sample has a condition of its own, so samples of one group may be drawn under
    different ones (prompts rewritten sample by sample).

    Attributes:
        keys: typed keys [group]; all noise of a group is drawn from its key.
        group: int32 [sample], the group of each sample.
        cond: pytree of [sample, ...], or None.
    """

    keys: Any
    group: Any
    cond: Cond

    @property
    def sample_keys(self) -> Any:
        """Typed keys [sample], one a sample, made of that of its group."""
        number = jnp.arange(len(self.group) // len(self.keys))
        return prng.fold_in(self.keys[:, None], number).reshape(-1)


def samples_of(keys: Any, group_size: int, cond: Cond = None) -> Samples:
    """Groups of so many samples each.

    Args:
        keys: typed keys [group].
        group_size: samples a group.
        cond: pytree of [group, ...], which the samples of a group share, or of
            [group * group_size, ...], one a sample; or None.

    Raises:
        ValueError: conditions of neither number.
    """
    groups, count = len(keys), len(keys) * group_size

    def repeated(leaf: Array) -> Array:
        if leaf.shape[0] not in (groups, count):
            raise ValueError(
                f"a condition has shape {leaf.shape}; give one a prompt, ({groups}, "
                f"...), or one a sample, ({count}, ...)."
            )
        return jnp.repeat(leaf, count // leaf.shape[0], axis=0)

    group = jnp.repeat(jnp.arange(groups), group_size)
    return Samples(keys, group, jax.tree.map(repeated, cond))


def stored_bytes(method: "FlowMethod", prompts: int) -> int:
    """Bytes of the states that a method keeps of a rollout of so many prompts."""
    table, plan = method.plan(0)

    def states(key: Any) -> Any:
        keys = prng.sample_keys(key, prompts)
        samples = samples_of(keys, method.group_size)
        return method.rollout(samples, lambda x, t, cond: x, table, plan)[1].states

    return trees.nbytes(jax.eval_shape(states, jax.random.key(0)))


class Credit(NamedTuple):
    """Which transitions train, and how.

    Attributes:
        edge: int [n], transitions of the record, n known before the rewards.
        advantage: float32 [n].
        weight: float32 [n] >= 0, 0 leaves a transition out of loss and denominator.
    """

    edge: Any
    advantage: Any
    weight: Any


@runtime_checkable
class FlowMethod(Protocol):
    """How samples are drawn and how credit is given; pure but for ``plan``.

    Attributes:
        group_size: samples a prompt.
        reduction: of log-probs over event dimensions, that of the objective.
    """

    group_size: int
    reduction: str

    def plan(self, iteration: int) -> tuple[flows.CoefficientTable, PyTree]:
        """Table and plan of an iteration, on the host (arrays of recurring shapes)."""
        ...

    def rollout(
        self,
        samples: Samples,
        velocity: Velocity,
        table: flows.CoefficientTable,
        plan: PyTree,
    ) -> tuple[Array, rl.Transitions]:
        """Draws the samples [sample, *event] and records their transitions; traced.

        Nodes and edges of the record are ordered by group first. A transition that
        several samples share, as near the root of a tree, is drawn under the condition
        of one of them, which the record names.
        """
        ...

    def credit(
        self,
        rewards: Array,
        group: Array,
        transitions: rl.Transitions,
        plan: PyTree,
        key: Any,
    ) -> Credit:
        """Credit from the rewards [sample] and the group [sample] of each; traced."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostReward:
    """A reward computed on the host, see :mod:`tmdjax.rewards.host`.

    Attributes:
        fn: ``(images numpy [n, ...], prompts: list of n rows) -> n numbers``; a row is
            the batch at that prompt, {name: numpy array}. It runs in a thread; with
            several chunks it may run in several at once.
        timeout: seconds for one chunk.
    """

    fn: Callable[[np.ndarray, list[Any]], Any]
    timeout: float = 600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowObjective:
    """The loss of a transition: clipped surrogate and KL to the reference.

    Attributes:
        clip_range: of the ratio, a number or (low, high); it belongs to `reduction`.
        reduction: of log-probs over event dimensions, 'mean' or 'sum'.
        kl_coefficient: weight of the KL, >= 0.
        kl_kind: 'transition', the divergence itself, 'flow_grpo_code', h times that,
            or 'velocity_mse' (:func:`tmdjax.flows.transition_kl`).
        step_weight: 'none', or 'inverse_gain', which evens out the gradients of early
            and late steps (:func:`tmdjax.flows.step_weights`).
        proximal: what ratios are clipped around: the 'behaviour', log-probs that the
            rollout recorded, or 'recompute', those that ``Policy.velocity`` gives
            before the update. 'auto' recomputes where ``Policy.precision`` says that
            the two differ beyond float32 rounding, and takes the behaviour elsewhere.
    """

    clip_range: rl.ClipRange = 1e-4
    reduction: str = "mean"
    kl_coefficient: float = 0.0
    kl_kind: str = "transition"
    step_weight: str = "none"
    proximal: str = "auto"

    def __post_init__(self) -> None:
        rl.check_clip_range(self.clip_range, self.reduction)
        check_range("kl_coefficient", self.kl_coefficient, 0)
        check_choice("kl_kind", self.kl_kind, flows.KL_KINDS)
        check_choice("step_weight", self.step_weight, flows.STEP_WEIGHTS)
        check_choice("proximal", self.proximal, rl.PROXIMAL)


class Rollout(NamedTuple):
    """What an iteration drew and how it was rewarded.

    Attributes:
        batch: the prompts, {name: [prompt, ...]}.
        records: transitions of each chunk of the prompts, in order.
        rewards: float32 numpy [prompt * group_size].
        number: of the iteration, int32.
        table: coefficients of the sampler.
        plan: what the method planned for this iteration.
    """

    batch: Any
    records: tuple[rl.Transitions, ...]
    rewards: np.ndarray
    number: Any
    table: flows.CoefficientTable
    plan: PyTree


class Setup(NamedTuple):
    """What a paper fixes.

    Attributes:
        method: how samples are drawn and credited.
        objective: the loss.
        updates: minibatches an iteration.
    """

    method: Any
    objective: FlowObjective
    updates: int


def make_setup(
    method: type[Any],
    event_shape: Sequence[int],
    published: Mapping[str, Any],
    changes: Mapping[str, Any],
    objective: Mapping[str, Any] | None = None,
) -> Setup:
    """A paper's settings with changes: what a system's ``preset`` returns.

    Args:
        method: a dataclass with the fields 'event_shape' and 'grid' among others.
        event_shape: of one sample.
        published: 'steps' of the grid, 'updates', 'objective' (fields of
            :class:`FlowObjective`), and fields of the method.
        changes: the same but for 'objective', also 'shift' of the grid (3 where nothing
            is said) or the whole 'grid'.
        objective: changed fields of the objective; log-probs are reduced as the method
            does unless it says otherwise.

    Raises:
        ValueError: settings out of range, or a grid given twice.
        TypeError: an unknown field, of the method or the objective; updates that are no
            integer.
    """
    if "grid" in changes and ("steps" in changes or "shift" in changes):
        raise ValueError("'grid' is all of the grid; drop 'steps' and 'shift'.")
    fields: dict[str, Any] = {"shift": 3.0, "objective": {}, **published, **changes}
    steps, shift, updates, loss = (
        fields.pop(name) for name in ("steps", "shift", "updates", "objective")
    )
    fields.setdefault("grid", flows.shifted_grid(steps, shift))
    check_fields(method, fields)
    built = method(event_shape=tuple(event_shape), **fields)
    loss = {"reduction": built.reduction, **loss, **(objective or {})}
    check_fields(FlowObjective, loss)
    return Setup(built, FlowObjective(**loss), check_count("updates", updates))
