"""Actions in chunks: one action of an environment is several of another's."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core import trees
from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Array, Key
from tmdjax.envs.base import Transition, check_environment


@dataclasses.dataclass(frozen=True)
class Chunked:
    """An environment whose action is a chunk of another's actions, executed whole.

    A step executes ``length`` actions one after the other; the policy sees nothing in
    between. The reward of the chunk is the sum of theirs, and what a learner calls its
    discount is that of a whole chunk. Where the episode ends inside a chunk, the rest
    of it is not executed, and observation and reward are those up to the end.

    Attributes:
        environment: any that keeps the protocol :class:`tmdjax.envs.Environment`, with
            actions [d].
        length: actions of a chunk (H); this environment's actions are [H * d], those of
            the first step first.
        discount: weight of each reward of a chunk over that of the one before it, in
            [0, 1]; 1 sums them.

    Raises:
        TypeError: no environment, or a length that is no integer.
        ValueError: a length below 1, a discount outside [0, 1].

    References:
        arXiv 2505.22094 and 2409.00588: 4 actions a chunk, their rewards summed.
    """

    environment: Any
    length: int
    discount: float = 1.0

    def __post_init__(self) -> None:
        check_count("length", self.length)
        check_range("discount", self.discount, 0, 1)
        check_environment(self.environment)

    @property
    def action_size(self) -> int:
        """Length of a chunk of actions, flat."""
        return self.length * self.environment.action_size

    @property
    def action_bound(self) -> float | None:
        """Bound of every action of a chunk, None if there is none."""
        return self.environment.action_bound

    @property
    def horizon(self) -> int:
        """Chunks an episode, where the environment has a number of steps."""
        return -(-self.environment.horizon // self.length)

    def reset(self, key: Key[Array, ""], first: bool = False) -> tuple[Any, Array]:
        """The environment's own start."""
        return self.environment.reset(key, first)

    def step(self, state: Any, action: Array, key: Key[Array, ""]) -> Transition:
        """Executes a chunk.

        Args:
            state: of the environment.
            action: float32 [length * d].
            key: one is split off for every action.

        Returns:
            The transition of the last action executed, with the sum of rewards.

        Raises:
            ValueError: an action of another length.
        """
        if action.shape != (self.action_size,):
            raise ValueError(
                f"action has shape {action.shape}; a chunk of length={self.length} "
                f"actions of {self.environment.action_size} is [{self.action_size}]."
            )

        def one(carry: Any, given: Any) -> tuple[Any, Any]:
            state, over = carry
            step = self.environment.step(state, *given)
            carry = (
                trees.select(over, state, step.state),
                over | step.terminated | step.truncated,
            )
            return carry, (step._replace(state=None), ~over)

        (state, _), (steps, executed) = jax.lax.scan(
            one,
            (state, jnp.array(False)),
            (action.reshape(self.length, -1), jax.random.split(key, self.length)),
        )
        weight = self.discount ** jnp.arange(self.length, dtype=jnp.float32)
        # where, not a product: what is not executed need not be finite
        reward = jnp.sum(jnp.where(executed, weight * steps.reward, 0))
        last = jax.tree.map(lambda x: x[executed.sum() - 1], steps)
        return last._replace(state=state, reward=reward)
