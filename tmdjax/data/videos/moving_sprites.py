"""A set of videos of sprites that move, with prompts, and what makes and says them."""

from collections.abc import Mapping
from pathlib import Path

from tmdjax.core.types import Array, SampleKeys
from tmdjax.data.dataset import Dataset
from tmdjax.data.procedural import make_dataset
from tmdjax.domains.sprites.drawing import bank as bank
from tmdjax.domains.sprites.drawing import moving_sprites
from tmdjax.domains.sprites.prompts import TEXT_WIDTH as TEXT_WIDTH
from tmdjax.domains.sprites.prompts import text_embedding as text_embedding
from tmdjax.domains.sprites.scenes import Scale as Scale
from tmdjax.domains.sprites.scenes import get_scale


def load_moving_sprites(
    files: Mapping[str, Path],
    *,
    train_count: int = 8192,
    test_count: int = 1024,
    seed: int = 0,
    scale: str = "small",
    levels: int | None = None,
) -> Dataset:
    """A fixed set of :func:`moving_sprites`; the class is the prompt.

    Returns:
        The arrays of :func:`moving_sprites`, and 'label', the prompt.
    """
    chosen = get_scale(scale)

    def sampler(keys: SampleKeys) -> dict[str, Array]:
        samples = moving_sprites(keys, scale=chosen, levels=levels)
        return {**samples, "label": samples["prompt"]}

    return make_dataset(
        "moving_sprites",
        sampler,
        train_count=train_count,
        test_count=test_count,
        seed=seed,
        num_classes=chosen.num_prompts,
        meta={"scale": chosen.name, "levels": levels, "seed": seed},
    )
