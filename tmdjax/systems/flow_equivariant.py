"""Flow equivariant world models: memory that moves with what it remembers.

A model sees some frames of a world and predicts hundreds that follow, its own frames
fed back. Its memory is a latent map, a copy for each velocity that things may have:
the copies slide, and the map moves against the agent's motion, so that what left the
view goes on moving. The models are :class:`tmdjax.models.TorusMap`,
:class:`tmdjax.models.EgocentricMap` and any other that keeps their protocol
(``prepare``, ``start``, ``observe``, ``predict``, ``feed``), and are trained and judged
by :mod:`tmdjax.train.world_models`.

References:
    Lillemark et al., "Flow Equivariant World Models", arXiv 2601.01075; Keller,
    "Flow Equivariant Recurrent Neural Networks", arXiv 2507.14793.
"""

import dataclasses
from typing import Any

from tmdjax import models, train
from tmdjax.core.checks import check_choice, check_fields
from tmdjax.domains.blocks.videos import BlockWorld
from tmdjax.domains.torus.videos import TorusWorld
from tmdjax.train.world_models import RolloutConfig


def check_world(module: Any, world: TorusWorld | BlockWorld) -> None:
    """Raises unless a network's map fits the world that its data show.

    A map of another period than the world's would wrap memory around at the wrong
    place, without any sign of it.

    Args:
        module: a :class:`tmdjax.models.TorusMap` for a torus, a
            :class:`tmdjax.models.EgocentricMap` for a room; other networks have no map,
            and nothing of them is checked.
        world: of the data.

    Raises:
        TypeError: the map of the other kind of world.
        ValueError: a map of other sizes.
    """
    if isinstance(world, BlockWorld):
        kind, other = models.EgocentricMap, models.TorusMap
        names = ("image_size", "view_degrees")
    else:
        kind, other = models.TorusMap, models.EgocentricMap
        names = ("world", "window")
    if isinstance(module, other):
        raise TypeError(
            f"the network is of type {other.__name__}, and the data show a "
            f"{type(world).__name__}; build a {kind.__name__}."
        )
    if not isinstance(module, kind):
        return
    if isinstance(world, BlockWorld) and module.world < world.room - 1:
        raise ValueError(
            f"the network's map reaches world={module.world} cells in every direction, "
            f"a room of {world.room} {world.room - 1} from its corner; build the "
            f"network with world={world.room - 1} or more."
        )
    for name in names:
        ours, theirs = getattr(module, name), getattr(world, name)
        if ours != theirs:
            raise ValueError(
                f"the network has {name}={ours}, the data {name}={theirs}; build the "
                f"network with {name}={theirs}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldModelSetup:
    """A network, its data and how it is trained.

    Attributes:
        module: the network.
        world: sizes of the videos.
        config: of rollouts in training.
        optimizer: of training.
        batch_size: videos an update.
    """

    module: Any
    world: Any
    config: RolloutConfig
    optimizer: train.OptimizerConfig
    batch_size: int


def preset(name: str, **changes: Any) -> WorldModelSetup:
    """Published settings, with changes.

    Args:
        name: 'torus', digits on a torus of 50 seen through a window of 32; 'blocks',
            the room of 16 with 6 moving blocks.
        **changes: fields of :class:`WorldModelSetup`.

    Raises:
        ValueError: an unknown preset, or a map of other sizes than the data's.
        TypeError: an unknown field, or a world or map of the other kind.

    References:
        The released code of arXiv 2601.01075.
    """
    check_choice("preset", name, ("torus", "blocks"))
    check_fields(WorldModelSetup, changes)
    kind = TorusWorld if name == "torus" else BlockWorld
    if not isinstance(given := changes.get("world", kind()), kind):
        raise TypeError(
            f"world is a {type(given).__name__}, and preset={name!r} has settings for "
            f"a {kind.__name__}; give one, or take the other preset."
        )
    if name == "torus":
        world = changes.get("world", TorusWorld())
        sizes = {"world": world.world, "window": world.window}
        module = models.TorusMap(**sizes, velocities=2, window_padding="circular")
        optimizer: dict[str, Any] = {"name": "adam"}
        config, batch = RolloutConfig(context=world.context), 32
    else:
        world = changes.get("world", BlockWorld())
        sizes = {"image_size": world.image_size, "world": world.room}
        module = models.EgocentricMap(**sizes, view_degrees=world.view_degrees)
        optimizer = {"name": "adamw", "b2": 0.99, "weight_decay": 1e-3}
        config, batch = RolloutConfig(context=world.context, teacher_forcing=0.125), 16
    fields = {"module": module, "world": world, "config": config, "batch_size": batch}
    fields["optimizer"] = train.OptimizerConfig(learning_rate=1e-4, **optimizer)
    setup = WorldModelSetup(**fields | changes)
    check_world(setup.module, setup.world)
    return setup
