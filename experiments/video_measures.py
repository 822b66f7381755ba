"""How videos of moving sprites are measured against their prompts and real ones."""

import functools
from typing import Any

import jax
import numpy as np

from experiments import video_tasks as tasks
from tmdjax import metrics
from tmdjax.core import prng
from tmdjax.data import moving_sprites
from tmdjax.domains.sprites import checks as checker

Config = Any
MEASURES = {
    "adherence": "share of videos that show all that the prompt asked for, in [0, 1]",
    "colour": "share of videos with the colour asked for, in [0, 1]",
    "shape": "share of videos with the shape asked for, in [0, 1]",
    "motion": "share of videos with the motion asked for, in [0, 1]",
    "sliced_wasserstein": "distance of pixels to real videos of the same prompts, in "
    "units of the data in [-1, 1], averaged over random directions; less is better",
    "feature_wasserstein": "the same distance of random video features",
    "frechet": "Frechet distance to real videos of the same prompts, in random video "
    "features; less is better",
    "start_entropy": "entropy in nats of where right videos of a prompt start; as high "
    "as that of real videos is all of the diversity there is",
}
"""What :func:`measure` finds of a set of videos, and what it means."""


@functools.lru_cache(maxsize=4)
def _real(scale: str, levels: int, asked: tuple[int, ...], draw: int) -> np.ndarray:
    keys = prng.sample_keys(jax.random.key(draw), len(asked))
    found = moving_sprites.moving_sprites(
        keys, scale=scale, levels=levels, prompts=np.asarray(asked, np.int32)
    )
    return np.asarray(found["video"])


def real_videos(config: Config, asked: Any, draw: int = 0) -> np.ndarray:
    """Videos that show what is asked for, of a key that no training set has."""
    asked = tuple(np.asarray(asked).tolist())
    return _real(config.data.scale, config.data.levels, asked, 7001 + draw)


def measure(config: Config, videos: Any, asked: Any) -> dict[str, float]:
    """Adherence to the prompts, distances to real videos of them, and diversity.

    The entropy of start positions is that of videos which show what was asked for: a
    noisy one starts anywhere.
    """
    scale, reference = tasks.scale_of(config), real_videos(config, asked)
    right = checker.check(videos, asked, scale)
    found = {k: float(np.mean(v)) for k, v in right.items() if k in MEASURES}
    features = metrics.video_features(videos)
    of_real = metrics.video_features(reference)
    distance = functools.partial(
        metrics.sliced_wasserstein, projections=config.sample.projections
    )
    start = np.asarray(checker.recognise(videos, scale)["start"], np.float64)
    start = np.where(right["all"][:, None], start, np.nan)
    return found | {
        "adherence": float(np.mean(right["all"])),
        "sliced_wasserstein": distance(videos, reference),
        "feature_wasserstein": distance(features, of_real),
        "frechet": metrics.frechet_distance(features, of_real),
        "start_entropy": metrics.position_entropy(start, np.asarray(asked)),
    }
