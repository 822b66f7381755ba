"""Networks: linen modules used as pure functions of a parameter dict."""

from tmdjax.models import lora
from tmdjax.models.attention import attention
from tmdjax.models.build import (
    MODELS,
    build,
    functional,
    init_params,
    spec_of,
    with_recipe,
)
from tmdjax.models.checkpoints.adapters import load_adapters, save_adapters
from tmdjax.models.checkpoints.decoder import load_decoder, save_decoder
from tmdjax.models.checkpoints.gguf import load_gguf
from tmdjax.models.checkpoints.video_dit import load_video_dit, save_video_dit
from tmdjax.models.control import ControlMLP, ControlVelocity, ObservationFeatures
from tmdjax.models.decoder.cache import (
    cache_bytes,
    decode,
    fuse_projections,
    init_cache,
    prefill,
)
from tmdjax.models.decoder.config import DecoderConfig
from tmdjax.models.decoder.network import Decoder
from tmdjax.models.decoder.token_log_probs import (
    chunked_token_log_probs,
    entropy_of,
    log_prob_of,
    token_entropies,
    token_log_probs,
)
from tmdjax.models.images.classifier import Classifier
from tmdjax.models.images.dit import DiT
from tmdjax.models.images.text_dit import TextDiT, TextEncoder, null_condition
from tmdjax.models.images.unet import UNet
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
from tmdjax.models.videos.discriminator import VideoDiscriminator, default_taps
from tmdjax.models.videos.dit import WAN_1_3B, WAN_14B, VideoDiT
from tmdjax.models.videos.flow_maps import SplitDiT, TwoTimeDiT, student_from_teacher
from tmdjax.models.videos.patches import (
    patchify_video,
    rotary_tables,
    unpatchify_video,
)
from tmdjax.models.wrappers import from_nnx, rectified_flow

__all__ = [
    "MODELS",
    "WAN_1_3B",
    "WAN_14B",
    "ClassEmbedding",
    "Classifier",
    "ControlMLP",
    "ControlVelocity",
    "Decoder",
    "DecoderConfig",
    "Dense",
    "DiT",
    "ObservationFeatures",
    "SplitDiT",
    "TextDiT",
    "TextEncoder",
    "TimeEmbedding",
    "TwoTimeDiT",
    "UNet",
    "VelocityMLP",
    "VideoDiT",
    "VideoDiscriminator",
    "attention",
    "build",
    "cache_bytes",
    "chunked_token_log_probs",
    "decode",
    "default_taps",
    "entropy_of",
    "from_nnx",
    "functional",
    "fuse_projections",
    "init_cache",
    "init_params",
    "layer_norm",
    "load_adapters",
    "load_decoder",
    "load_gguf",
    "load_video_dit",
    "log_prob_of",
    "lora",
    "null_condition",
    "patchify",
    "patchify_video",
    "position_embedding_2d",
    "prefill",
    "rectified_flow",
    "rotary_tables",
    "save_adapters",
    "save_decoder",
    "save_video_dit",
    "spec_of",
    "student_from_teacher",
    "timestep_embedding",
    "token_entropies",
    "token_log_probs",
    "unpatchify",
    "unpatchify_video",
    "with_recipe",
]
