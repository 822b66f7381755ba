"""DanceGRPO's iteration in PyTorch, as a rival to measure.

The same network (:mod:`benchmarks.torch_dit`), the same transitions, loss and number of
updates; noise, order and random subsets are PyTorch's own. Rollouts are batched, one
call a step; step and loss are compiled unless told otherwise.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.torch_dit import DiT, convert
from tmdjax import models
from tmdjax.core.types import Params
from tmdjax.flows import CoefficientTable
from tmdjax.systems import flow_grpo
from tmdjax.train import flow_rl

_COLUMNS = ("t", "t_next", "k", "std", "log_prob_std")


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
        objective: flow_rl.FlowObjective,
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
