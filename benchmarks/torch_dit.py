"""The DiT of tmdjax in PyTorch, for rivals to measure; our parameters are converted."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tmdjax import models
from tmdjax.core import trees
from tmdjax.core.types import Params
from tmdjax.models.layers import position_embedding_2d

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FREQUENCIES = 256


def _linear(layer: nn.Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, dtype: torch.dtype):
        super().__init__()
        self.heads, self.dtype = heads, dtype
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        def project(layer: nn.Linear, y: Tensor) -> Tensor:
            y = _linear(layer, y, self.dtype)
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        y = F.scaled_dot_product_attention(
            project(self.query, x),
            project(self.key, context),
            project(self.value, context),
            attn_mask=mask,
        )
        return _linear(self.out, y.transpose(1, 2).flatten(2), self.dtype)


class _Block(nn.Module):
    def __init__(
        self, width: int, heads: int, mlp_width: int, dtype: torch.dtype, tokens: bool
    ):
        super().__init__()
        self.dtype = dtype
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = _Attention(width, heads, dtype)
        if tokens:
            self.cross_attention = _Attention(width, heads, dtype)
        self.mlp_in = nn.Linear(width, mlp_width)
        self.mlp_out = nn.Linear(mlp_width, width)

    def forward(
        self, h: Tensor, c: Tensor, tokens: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        dtype = self.dtype
        modulation = _linear(self.modulation, F.silu(c), dtype).float()[:, None]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, -1)
        x = (_layer_norm(h) * (1 + scale) + shift).to(dtype)
        h = h + (gate * self.attention(x, x)).to(dtype)
        if tokens is not None:
            h = h + self.cross_attention(_layer_norm(h).to(dtype), tokens, mask)
        x = (_layer_norm(h) * (1 + mlp_scale) + mlp_shift).to(dtype)
        x = F.gelu(_linear(self.mlp_in, x, dtype), approximate="tanh")
        return h + (mlp_gate * _linear(self.mlp_out, x, dtype)).to(dtype)


class _TimeEmbedding(nn.Module):
    frequencies: Tensor

    def __init__(self, width: int, time_scale: float, dtype: torch.dtype):
        super().__init__()
        self.time_scale, self.dtype = time_scale, dtype
        self.hidden = nn.Linear(_FREQUENCIES, width)
        self.out = nn.Linear(width, width)
        half = _FREQUENCIES // 2
        frequencies = np.exp(-np.log(10000.0) * np.arange(half) / half)
        _constant(self, "frequencies", frequencies)

    def forward(self, t: Tensor) -> Tensor:
        angles = (self.time_scale * t)[:, None] * self.frequencies
        y = torch.cat([angles.cos(), angles.sin()], -1)
        y = F.silu(_linear(self.hidden, y, self.dtype))
        return _linear(self.out, y, self.dtype).float()


class _Output(nn.Module):
    def __init__(self, width: int, features: int, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.modulation = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(width, features)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        modulation = _linear(self.modulation, F.silu(c), self.dtype)
        shift, scale = modulation.float()[:, None].chunk(2, -1)
        h = (_layer_norm(h) * (1 + scale) + shift).to(self.dtype)
        return _linear(self.projection, h, self.dtype).float()


def _constant(module: nn.Module, name: str, array: np.ndarray) -> None:
    """An array that moves with the module and is no parameter."""
    buffer = torch.tensor(array, dtype=torch.float32)
    module.register_buffer(name, buffer, persistent=False)


class DiT(nn.Module):
    """:class:`tmdjax.models.DiT` for images of one size, without classes.

    Args:
        module: the network to copy.
        event_shape: (height, width, channel) of the images.

    Raises:
        ValueError: a network of another kind.
    """

    positions: Tensor

    def __init__(self, module: models.DiT, event_shape: tuple[int, ...]):
        super().__init__()
        height, width, channel = event_shape
        patch, hidden = module.patch_size, module.hidden
        if module.num_classes is not None:
            raise ValueError(
                "the DiT written in PyTorch knows no classes; give one without "
                "num_classes."
            )
        token_width = module.token_width
        self.dtype, self.remat = _DTYPES[module.recipe.name], module.remat
        self.patch, self.grid = patch, (height // patch, width // patch)
        features = patch * patch * channel
        self.patch_embedding = nn.Linear(features, hidden)
        self.time_embedding = _TimeEmbedding(hidden, module.time_scale, self.dtype)
        if token_width is not None:
            self.token_projection = nn.Linear(token_width, hidden)
            self.null_token = nn.Parameter(torch.zeros(hidden))
        mlp_width = int(hidden * module.mlp_ratio)
        self.blocks = nn.ModuleList(
            _Block(hidden, module.heads, mlp_width, self.dtype, token_width is not None)
            for _ in range(module.depth)
        )
        self.final = _Output(hidden, features, self.dtype)
        positions = position_embedding_2d(*self.grid, hidden)
        _constant(self, "positions", positions)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Velocity [batch, height, width, channel], float32.

        Args:
            x: [batch, height, width, channel].
            t: [batch].
            tokens: [batch, length, width], where the network takes them.
            mask: bool [batch, length], True at real tokens.
        """
        if (tokens is None or mask is None) and hasattr(self, "token_projection"):
            raise ValueError(
                "this network is conditioned on tokens; give tokens, mask."
            )
        (rows, columns), patch, dtype = self.grid, self.patch, self.dtype
        batch, channel = x.shape[0], x.shape[-1]
        x = x.reshape(batch, rows, patch, columns, patch, channel)
        x = x.transpose(2, 3).reshape(batch, rows * columns, -1)
        c = self.time_embedding(t)
        h = _linear(self.patch_embedding, x, dtype) + self.positions
        h = h.to(dtype)
        if tokens is not None and mask is not None:
            tokens = _linear(self.token_projection, tokens, dtype)
            null = self.null_token.to(dtype).expand(batch, 1, -1)
            tokens = torch.cat([null, tokens], 1)
            mask = F.pad(mask, (1, 0), value=True)[:, None, None]
        for block in self.blocks:
            if self.remat and torch.is_grad_enabled():
                h = checkpoint(
                    block,
                    h,
                    c,
                    tokens,
                    mask,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                h = block(h, c, tokens, mask)
        y = self.final(h, c)
        y = y.reshape(batch, rows, columns, patch, patch, channel)
        return y.transpose(2, 3).reshape(batch, rows * patch, columns * patch, channel)


def convert(params: Params) -> dict[str, Tensor]:
    """Our parameters as a state dict of :class:`DiT`."""
    found = {}
    for path, leaf in trees.flatten(params).items():
        name, array = path.replace("/", "."), np.asarray(leaf)
        if name.endswith(".kernel"):
            name = name.removesuffix("kernel") + "weight"
            array = array.swapaxes(-1, -2)
        tensor = torch.tensor(array)
        if name.startswith("blocks."):
            for i, layer in enumerate(tensor):
                found[name.replace("blocks.", f"blocks.{i}.", 1)] = layer.clone()
        else:
            found[name] = tensor
    return found
