"""Features of many videos: convolutions are slow without the compiler's optimisations."""

import jax
import numpy as np

from tmdjax.core.prng import sample_keys
from tmdjax.data import moving_sprites
from tmdjax.metrics import frechet_distance, sliced_wasserstein, video_features


def test_distances_rise_from_the_floor_of_real_videos_with_the_damage():
    draw = jax.jit(lambda keys: moving_sprites.moving_sprites(keys)["video"])
    real, again = (
        jax.device_get(draw(sample_keys(jax.random.key(seed), 512))) for seed in (0, 1)
    )
    noise = np.random.default_rng(0).standard_normal(real.shape).astype(np.float32)
    damaged = {
        "floor": again,
        "noise 0.1": again + 0.1 * noise,
        "noise 0.3": again + 0.3 * noise,
        "still": np.repeat(again[:, :1], 6, axis=1),
        "one colour": again[:, ..., [0, 0, 0]],
    }
    reference = video_features(real)
    features = {name: video_features(videos) for name, videos in damaged.items()}
    for distance in (frechet_distance, sliced_wasserstein):
        found = {name: distance(rows, reference) for name, rows in features.items()}
        floor, still = found.pop("floor"), found["still"]
        assert min(found.values()) > 1.1 * floor, found
        assert found["noise 0.3"] > 2 * max(found["noise 0.1"], floor), found
        assert found["one colour"] > 2 * floor, found
        # What a mean over channels and places sees of motion, covariances see best.
        assert distance is sliced_wasserstein or still > 2 * floor
