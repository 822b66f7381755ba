"""A supervised training that is a stage: how it begins, what it minimises, its loop.

Pretrained bases, feature networks and students are trained by it alike: on the mesh of
all devices, with the checkpoints and logs of the stage.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from tmdjax import data, train
from tmdjax.core import prng
from tmdjax.core.types import Params, SampleKeys
from tmdjax.harness import StageContext, Update


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised:
    """Everything but the data and the length.

    Attributes:
        init: ``key -> params``; traceable.
        loss: ``(params, batch, keys) -> (loss [batch], metrics)``, see
            :func:`tmdjax.train.make_train_step`.
        optimizer: of all parameters.
        ema_decay: of the averaged parameters; None keeps no average.
        microbatches: parts of a batch.
    """

    init: Callable[[Any], Params]
    loss: Callable[[Params, Any, SampleKeys], Any]
    optimizer: optax.GradientTransformation
    ema_decay: float | None = None
    microbatches: int = 1

    def begin(self, key: Any) -> train.TrainState:
        """The state before the first update; traceable."""
        ema = self.ema_decay is not None
        return train.create_state(self.init(key), self.optimizer, ema=ema)

    def step(self) -> Callable[..., Any]:
        """``(state, batch, key) -> (state, metrics)``, not yet jitted."""
        return train.make_train_step(
            self.loss,
            self.optimizer,
            ema_decay=self.ema_decay,
            microbatches=self.microbatches,
        )

    def update(self, batch: Any) -> Update:
        """The step and the shapes of its arguments, nothing allocated.

        Args:
            batch: shapes of a batch.
        """
        key = jax.eval_shape(lambda: jax.random.key(0))
        return Update(self.step(), (jax.eval_shape(self.begin, key), batch, key), 0)

    def fit(
        self,
        context: StageContext,
        arrays: Mapping[str, Any] | train.DataIterator,
        settings: Any,
    ) -> train.TrainState:
        """Trains in a stage, from its key, in batches drawn in the order of its seed.

        Args:
            context: of the stage.
            arrays: {name: [n, ...]}, the data; or batches of the size in settings, with
                a position. Batches of several shapes are several programs.
            settings: 'steps', 'batch_size' and, unless 50 will do, 'log_every'.

        Returns:
            The final state.
        """
        size, batches = settings["batch_size"], arrays
        if isinstance(batches, Mapping):
            batches = data.in_memory(batches, size, seed=context.seed)
        state = self.begin(context.key)
        step, state, place = train.jit_train_step(self.step(), state, train.make_mesh())

        def diagnose(state: Any, batch: Any, key: Any) -> str:
            keys = prng.sample_keys(key, size)
            return train.nonfinite_report(self.loss, state.params, batch, keys)

        return context.fit(
            state,
            step,
            batches,
            num_steps=settings["steps"],
            place=place,
            log_every=settings.get("log_every", 50),
            diagnose=diagnose,
        )
