"""Networks of long rollouts in PyTorch, for rivals to measure; ours are converted."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmdjax import models
from tmdjax.core import trees
from tmdjax.core.types import Params
from tmdjax.models.fields import DILATIONS


class _TimeEmbedding(nn.Module):
    frequencies: Tensor

    def __init__(self, width: int, time_scale: float):
        super().__init__()
        self.time_scale = time_scale
        self.hidden = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, 4 * width)
        half = width // 2
        frequencies = np.exp(-np.log(10000.0) * np.arange(half) / half)
        buffer = torch.tensor(frequencies, dtype=torch.float32)
        self.register_buffer("frequencies", buffer, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = (self.time_scale * t)[:, None] * self.frequencies
        return self.out(F.gelu(self.hidden(torch.cat([angles.cos(), angles.sin()], 1))))


class DilatedResNet(nn.Module):
    """:class:`tmdjax.models.DilatedResNet` in one dimension, without scalars.

    Args:
        module: the network to copy.
        channels: of its input.

    Raises:
        ValueError: a network of another kind.
    """

    def __init__(self, module: models.DilatedResNet, channels: int):
        super().__init__()
        if module.dims != 1 or module.scalars or module.recipe.name != "fp32":
            raise ValueError(
                "the network written in PyTorch has one dimension, no scalars and "
                "float32; give such a one."
            )
        width, layers = module.width, range(module.layers)
        self.embedding = nn.ModuleDict(
            {"time_embedding": _TimeEmbedding(width, module.time_scale)}
        )
        self.dilations = [DILATIONS[i % len(DILATIONS)] for i in layers]
        self.input = nn.Conv1d(channels, width, 3)
        self.output = nn.Conv1d(width, module.out_channels or channels, 3)
        self.modulations = nn.ModuleList(
            nn.Linear(4 * width, 2 * width) for _ in layers
        )
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, 3, dilation=d) for d in self.dilations
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Maps fields [batch, channel, x] at times t [batch] to such fields."""
        embedding = self.embedding["time_embedding"](t)
        h = self.input(_wrapped(x, 1))
        for modulation, convolution, ends in zip(
            self.modulations, self.convolutions, self.dilations
        ):
            scale, shift = modulation(embedding)[..., None].chunk(2, 1)
            h = h + convolution(_wrapped(F.gelu(h * (1 + scale) + shift), ends))
        return self.output(_wrapped(F.gelu(h), 1))


def _wrapped(x: Tensor, ends: int) -> Tensor:
    return F.pad(x, (ends, ends), mode="circular")


class TorusMap(nn.Module):
    """A step of :class:`tmdjax.models.TorusMap` that predicts a frame.

    Args:
        module: the network to copy.

    Raises:
        ValueError: a network of another kind.
    """

    velocities: Tensor

    def __init__(self, module: models.TorusMap):
        super().__init__()
        small = module.window < module.world and module.window_padding != "circular"
        if (module.self_motion, module.feedback) != ("shift", "stale") or not small:
            raise ValueError(
                "the map written in PyTorch moves against the agent, reads stale "
                "frames and has a window smaller than the world; give such a one."
            )
        self.window, self.room = module.window, module.world - module.window
        self.ends = module.kernel_size // 2
        size, hidden = (module.kernel_size,) * 2, module.hidden
        sizes = {"encoder": (hidden, module.channels), "memory": (hidden, hidden)}
        names = [f"decoder_{i}" for i in range(module.decoder_layers)]
        sizes |= dict.fromkeys(names, (hidden, hidden))
        sizes["decoder_out"] = (module.channels, hidden)
        self.readers = [*names, "decoder_out"]
        self.kernels = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(*s, *size)) for name, s in sizes.items()}
        )
        velocities = torch.tensor(module.velocities)
        self.register_buffer("velocities", velocities, persistent=False)

    def forward(
        self, maps: Tensor, frame: Tensor, action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The maps a step later, and the frame that they show.

        Args:
            maps: [batch, velocity, channel, row, column].
            frame: the one before, [batch, channel, row, column].
            action: the window's motion (x, y), integers [batch, 2].
        """
        batch, copies, _, rows, columns = maps.shape
        steps = self.velocities - action[:, None]
        row = torch.arange(rows, device=maps.device)
        row = (row - steps[..., 1, None]) % rows
        column = torch.arange(columns, device=maps.device)
        column = (column - steps[..., 0, None]) % columns
        place = (row[..., :, None] * columns + column[..., None, :]).flatten(2)
        flat = maps.flatten(3)
        maps = flat.gather(3, place[:, :, None].expand_as(flat)).view_as(maps)
        ends = (self.ends,) * 4
        h = F.pad(maps.flatten(0, 1), ends, mode="circular")
        h = F.conv2d(h, self.kernels["memory"])
        seen = F.conv2d(frame, self.kernels["encoder"], padding=self.ends)
        seen = F.pad(seen, (0, self.room, 0, self.room))
        maps = F.relu(h.view(batch, copies, *h.shape[1:]) + seen[:, None])
        h = maps[..., : self.window, : self.window].amax(1)
        for i, name in enumerate(self.readers):
            h = F.relu(h) if i else h
            h = F.conv2d(h, self.kernels[name], padding=self.ends)
        return maps, h


def convert(params: Params) -> dict[str, Tensor]:
    """Our parameters of either network as a state dict of it."""
    found = {}
    for path, leaf in trees.flatten(params).items():
        array, name = np.asarray(leaf), path.replace("/", ".")
        if array.ndim > 1:  # [*size, in, out]
            array = np.moveaxis(array, (-1, -2), (0, 1))
        for kind in ("modulation", "convolution"):
            name = name.replace(f"{kind}_", f"{kind}s.")
        name = name.replace(".kernel", ".weight")
        name = name if "." in name else f"kernels.{name}"
        found[name] = torch.tensor(np.ascontiguousarray(array))
    return found
