"""The DiT of tmdjax and DanceGRPO's iteration in PyTorch, as a rival to measure.

The same network (our parameters are converted), the same transitions, loss and number
of updates; noise, order and random subsets are PyTorch's own. Rollouts are batched,
one call a step; step and loss are compiled unless told otherwise.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tmdjax import models
from tmdjax.core import trees
from tmdjax.core.types import Params
from tmdjax.flows import CoefficientTable
from tmdjax.models.layers import position_embedding_2d
from tmdjax.systems import flow_grpo
from tmdjax.train import flow_rl

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FREQUENCIES = 256
_COLUMNS = ("t", "t_next", "k", "std", "log_prob_std")


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
    def __init__(self, width: int, heads: int, mlp_width: int, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = _Attention(width, heads, dtype)
        self.cross_attention = _Attention(width, heads, dtype)
        self.mlp_in = nn.Linear(width, mlp_width)
        self.mlp_out = nn.Linear(mlp_width, width)

    def forward(self, h: Tensor, c: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        dtype = self.dtype
        modulation = _linear(self.modulation, F.silu(c), dtype).float()[:, None]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, -1)
        x = (_layer_norm(h) * (1 + scale) + shift).to(dtype)
        h = h + (gate * self.attention(x, x)).to(dtype)
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
    """:class:`tmdjax.models.DiT` with token conditions, for images of one size.

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
        if module.token_width is None or module.num_classes is not None:
            raise ValueError(
                "only a DiT conditioned on tokens is written in PyTorch; give one "
                "with token_width and without num_classes."
            )
        self.dtype, self.remat = _DTYPES[module.recipe], module.remat
        self.patch, self.grid = patch, (height // patch, width // patch)
        features = patch * patch * channel
        self.patch_embedding = nn.Linear(features, hidden)
        self.time_embedding = _TimeEmbedding(hidden, module.time_scale, self.dtype)
        self.token_projection = nn.Linear(module.token_width, hidden)
        self.null_token = nn.Parameter(torch.zeros(hidden))
        mlp_width = int(hidden * module.mlp_ratio)
        self.blocks = nn.ModuleList(
            _Block(hidden, module.heads, mlp_width, self.dtype)
            for _ in range(module.depth)
        )
        self.final = _Output(hidden, features, self.dtype)
        positions = position_embedding_2d(*self.grid, hidden)
        _constant(self, "positions", positions)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Velocity [batch, height, width, channel], float32.

        Args:
            x: [batch, height, width, channel].
            t: [batch].
            tokens: [batch, length, width].
            mask: bool [batch, length], True at real tokens.
        """
        (rows, columns), patch, dtype = self.grid, self.patch, self.dtype
        batch, channel = x.shape[0], x.shape[-1]
        x = x.reshape(batch, rows, patch, columns, patch, channel)
        x = x.transpose(2, 3).reshape(batch, rows * columns, -1)
        c = self.time_embedding(t)
        h = _linear(self.patch_embedding, x, dtype) + self.positions
        h = h.to(dtype)
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


class Rival:
    """DanceGRPO's iteration: rollout, rewards, group advantages, updates.

    Args:
        module: our network.
        params: its parameters.
        method: chains whose advantages are scaled by group.
        objective: the loss, without KL.
        table: of the method, its stored steps the first ones.
        stored: how many steps are stored.
        trained: how many of these train, at random, a sample.
        batch: {'tokens': [prompt, ...], 'mask': ...}, a row a prompt.
        updates: minibatches an iteration.
        microbatches: parts of a minibatch.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        clip_norm: of the gradient.
        compiled: whether step and loss go through ``torch.compile``.

    Raises:
        ValueError: a method or an objective that is not DanceGRPO's.
    """

    def __init__(
        self,
        module: models.DiT,
        params: Params,
        method: flow_grpo.Chains,
        objective: flow_rl.Objective,
        table: CoefficientTable,
        stored: int,
        trained: int,
        batch: Mapping[str, Any],
        *,
        updates: int,
        microbatches: int,
        learning_rate: float,
        weight_decay: float,
        clip_norm: float,
        compiled: bool,
    ):
        if (
            method.scale != "group"
            or method.reduction != "mean"
            or table.final != "x0_hat"
        ):
            raise ValueError(
                "only DanceGRPO is written in PyTorch: scale='group', "
                "reduction='mean', final='x0_hat'."
            )
        if objective.kl_coefficient or objective.step_weight != "none":
            raise ValueError("the loss written in PyTorch has no KL and no weights.")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.method, self.stored, self.trained = method, stored, trained
        self.updates, self.microbatches = updates, microbatches
        self.clip_norm, self.clip_range = clip_norm, objective.clip_range
        self.network = DiT(module, method.event_shape)
        self.network.load_state_dict(convert(params))
        self.network.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=learning_rate,
            weight_decay=weight_decay,
            fused=self.device == "cuda",
        )
        columns = {**table.columns(), "std": table.c * table.S}
        rows = np.stack([columns[name] for name in _COLUMNS], 1)
        self.rows = self.tensor(rows.astype(np.float32))
        self.condition = tuple(
            self.tensor(batch[name]).repeat_interleave(method.group_size, 0)
            for name in ("tokens", "mask")
        )
        self.step, self.loss = self._step, self._loss
        if compiled:
            self.step = torch.compile(self._step)
            self.loss = torch.compile(self._loss)

    def tensor(self, array: Any) -> Tensor:
        """An array of the host or of jax, on the device."""
        return torch.tensor(np.asarray(array), device=self.device)

    def synchronise(self) -> None:
        """Waits for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _mean(self, x: Tensor, rows: Tensor, condition: tuple[Tensor, Tensor]) -> Any:
        """Mean of the transition, x0_hat and both standard deviations."""
        columns = rows.reshape(*rows.shape, *(1,) * (x.ndim - 1)).unbind(1)
        t, t_next, k, std, log_prob_std = columns
        v = self.network(x, rows[:, 0], *condition)
        x0_hat = x - t * v
        return (1 - t_next) * x0_hat + k * (x + (1 - t) * v), x0_hat, std, log_prob_std

    @staticmethod
    def _log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        z = (x_next - mean) / std
        return (-0.5 * z * z - std.log() - 0.5 * np.log(2 * np.pi)).flatten(1).mean(1)

    def _step(self, x: Tensor, z: Tensor, row: Tensor, condition: Any) -> Any:
        rows = row.expand(x.shape[0], -1)
        mean, x0_hat, std, log_prob_std = self._mean(x, rows, condition)
        x_next = mean + std * z
        return x_next, x0_hat, self._log_prob(x_next, mean, log_prob_std)

    def _loss(
        self,
        x: Tensor,
        x_next: Tensor,
        rows: Tensor,
        condition: Any,
        behaviour: Tensor,
        advantage: Tensor,
        weight: Tensor,
    ) -> Tensor:
        mean, _, _, std = self._mean(x, rows, condition)
        ratio = (self._log_prob(x_next, mean, std) - behaviour).exp()
        pair = self.clip_range
        low, high = pair if isinstance(pair, tuple) else (pair, pair)
        clipped = ratio.clamp(1 - low, 1 + high)
        surrogate = torch.maximum(-advantage * ratio, -advantage * clipped)
        return (weight * surrogate).sum()

    @torch.no_grad()
    def rollout(
        self, start: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws all groups.

        Args:
            start: [sample, *event]; None draws it.
            noise: [step, sample, *event]; None draws it.

        Returns:
            Samples [sample, *event], states [sample, stored + 1, *event], log-probs
            [sample, stored].
        """
        count, event = self.condition[0].shape[0], self.method.event_shape
        group = self.method.group_size if self.method.same_noise else 1
        if start is None:
            drawn = torch.randn(count // group, *event, device=self.device)
            start = drawn.repeat_interleave(group, 0)
        x = x0_hat = start
        states, log_probs = [x], []
        for i, row in enumerate(self.rows):
            z = torch.randn_like(x) if noise is None else noise[i]
            x, x0_hat, log_prob = self.step(x, z, row[None], self.condition)
            if i < self.stored:
                states.append(x)
                log_probs.append(log_prob)
        return x0_hat, torch.stack(states, 1), torch.stack(log_probs, 1)

    @staticmethod
    def reward(samples: Tensor) -> Tensor:
        """How much redder than green and blue an image is, [sample]."""
        return samples[..., 0].mean((1, 2)) - samples[..., 1:].mean((1, 2, 3))

    def gradient(
        self,
        states: Tensor,
        log_probs: Tensor,
        sample: Tensor,
        step: Tensor,
        advantage: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """Accumulates the gradient of a minibatch; returns its norm before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = (column.chunk(self.microbatches) for column in (sample, step, weight))
        for of_sample, of_step, share in zip(*parts):
            tokens, mask = self.condition
            self.loss(
                states[of_sample, of_step],
                states[of_sample, of_step + 1],
                self.rows[of_step],
                (tokens[of_sample], mask[of_sample]),
                log_probs[of_sample, of_step],
                advantage[of_sample],
                share,
            ).backward()
        return nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)

    def update(self, states: Tensor, log_probs: Tensor, rewards: Tensor) -> None:
        """All updates of an iteration."""
        method, count = self.method, rewards.shape[0]
        groups = rewards.reshape(-1, method.group_size)
        deviation = groups - groups.mean(1, keepdim=True)
        std = groups.std(1, keepdim=True, correction=method.ddof)
        clip = method.advantage_clip
        advantage = (deviation / (std + method.eps)).clamp(-clip, clip).reshape(-1)
        kept = torch.rand(count, self.stored, device=self.device).argsort(1)
        step = kept[:, : self.trained].reshape(-1)
        sample = torch.arange(count, device=self.device)
        sample = sample.repeat_interleave(self.trained)
        pairs = len(step)
        # Minibatches of one size (the last is filled up with weight 0), so that
        # nothing is compiled twice.
        share = -(-pairs // self.updates)
        size = -(-share // self.microbatches) * self.microbatches
        order = torch.randperm(pairs, device=self.device)
        for part in order.split(share):
            filled = F.pad(part, (0, size - len(part)))
            weight = torch.full((len(part),), 1 / len(part), device=self.device)
            weight = F.pad(weight, (0, size - len(part)))
            self.gradient(
                states, log_probs, sample[filled], step[filled], advantage, weight
            )
            self.optimizer.step()
