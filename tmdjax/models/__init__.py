"""Networks: linen modules used as pure functions of a parameter dict."""

from tmdjax.models import lora
from tmdjax.models.attention import attention
from tmdjax.models.build import MODELS, build, functional, init_params, spec_of
from tmdjax.models.classifier import Classifier
from tmdjax.models.control import ControlMLP, ControlVelocity, ObservationFeatures
from tmdjax.models.dit import DiT
from tmdjax.models.layers import (
    ClassEmbedding,
    Dense,
    TimeEmbedding,
    layer_norm,
    patchify,
    position_embedding_2d,
    timestep_embedding,
    unpatchify,
)
from tmdjax.models.mlp import VelocityMLP
from tmdjax.models.text_dit import TextDiT, TextEncoder, null_condition
from tmdjax.models.unet import UNet
from tmdjax.models.wrappers import rectified_flow

__all__ = [
    "MODELS",
    "ClassEmbedding",
    "Classifier",
    "ControlMLP",
    "ControlVelocity",
    "Dense",
    "DiT",
    "ObservationFeatures",
    "TextDiT",
    "TextEncoder",
    "TimeEmbedding",
    "UNet",
    "VelocityMLP",
    "attention",
    "build",
    "functional",
    "init_params",
    "layer_norm",
    "lora",
    "null_condition",
    "patchify",
    "position_embedding_2d",
    "rectified_flow",
    "spec_of",
    "timestep_embedding",
    "unpatchify",
]
