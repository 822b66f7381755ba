"""Data sources, procedural sets, and batches that resume exactly."""

from tmdjax.data import procedural
from tmdjax.data.dataset import Dataset
from tmdjax.data.images import captioned_shapes, rendered_text
from tmdjax.data.pipeline import (
    Batches,
    BatchPlan,
    array_record,
    in_memory,
    write_array_record,
)
from tmdjax.data.procedural import MIXTURE
from tmdjax.data.sources import SOURCES, Source, load
from tmdjax.data.videos import moving_sprites
from tmdjax.data.videos.files import video_batches
from tmdjax.domains.shapes import captions

__all__ = [
    "MIXTURE",
    "SOURCES",
    "BatchPlan",
    "Batches",
    "Dataset",
    "Source",
    "array_record",
    "captioned_shapes",
    "captions",
    "in_memory",
    "load",
    "moving_sprites",
    "procedural",
    "rendered_text",
    "video_batches",
    "write_array_record",
]
