"""Data sources, procedural sets, and batches that resume exactly."""

from tmdjax.data import pde as pde
from tmdjax.data import procedural as procedural
from tmdjax.data.dataset import Dataset as Dataset
from tmdjax.data.demonstration_files import load_demonstrations as load_demonstrations
from tmdjax.data.demonstrations import Demonstrations as Demonstrations
from tmdjax.data.demonstrations import action_bounds as action_bounds
from tmdjax.data.demonstrations import action_chunks as action_chunks
from tmdjax.data.demonstrations import observation_bounds as observation_bounds
from tmdjax.data.demonstrations import read_demonstrations as read_demonstrations
from tmdjax.data.demonstrations import write_demonstrations as write_demonstrations
from tmdjax.data.images import captioned_shapes as captioned_shapes
from tmdjax.data.images import rendered_text as rendered_text
from tmdjax.data.pipeline import Batches as Batches
from tmdjax.data.pipeline import BatchPlan as BatchPlan
from tmdjax.data.pipeline import array_record as array_record
from tmdjax.data.pipeline import in_memory as in_memory
from tmdjax.data.pipeline import write_array_record as write_array_record
from tmdjax.data.procedural import MIXTURE as MIXTURE
from tmdjax.data.sources import SOURCES as SOURCES
from tmdjax.data.sources import Source as Source
from tmdjax.data.sources import files_of as files_of
from tmdjax.data.sources import load as load
from tmdjax.data.videos import moving_sprites as moving_sprites
from tmdjax.data.videos.files import video_batches as video_batches
from tmdjax.domains.shapes import captions as captions
