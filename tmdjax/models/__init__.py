"""Networks: linen modules used as pure functions of a parameter dict."""

from tmdjax.models import lora as lora
from tmdjax.models.attention import attention as attention
from tmdjax.models.build import MODELS as MODELS
from tmdjax.models.build import build as build
from tmdjax.models.build import functional as functional
from tmdjax.models.build import init_params as init_params
from tmdjax.models.build import spec_of as spec_of
from tmdjax.models.build import with_recipe as with_recipe
from tmdjax.models.chain_policy import ChainPolicy as ChainPolicy
from tmdjax.models.chain_policy import action_size_of as action_size_of
from tmdjax.models.checkpoints.adapters import adapters_from_hf as adapters_from_hf
from tmdjax.models.checkpoints.adapters import load_adapters as load_adapters
from tmdjax.models.checkpoints.adapters import save_adapters as save_adapters
from tmdjax.models.checkpoints.decoder import load_decoder as load_decoder
from tmdjax.models.checkpoints.decoder import params_from_hf as params_from_hf
from tmdjax.models.checkpoints.decoder import params_to_hf as params_to_hf
from tmdjax.models.checkpoints.decoder import save_decoder as save_decoder
from tmdjax.models.checkpoints.gguf import load_gguf as load_gguf
from tmdjax.models.checkpoints.video_adapters import (
    adapters_from_hf_video as adapters_from_hf_video,
)
from tmdjax.models.checkpoints.video_adapters import (
    load_video_adapters as load_video_adapters,
)
from tmdjax.models.checkpoints.video_adapters import (
    save_video_adapters as save_video_adapters,
)
from tmdjax.models.checkpoints.video_dit import load_video_dit as load_video_dit
from tmdjax.models.checkpoints.video_dit import (
    params_from_hf_video as params_from_hf_video,
)
from tmdjax.models.checkpoints.video_dit import params_to_hf_video as params_to_hf_video
from tmdjax.models.checkpoints.video_dit import save_video_dit as save_video_dit
from tmdjax.models.checkpoints.video_dit import video_dit_from_hf as video_dit_from_hf
from tmdjax.models.control import ControlMLP as ControlMLP
from tmdjax.models.control import ControlVelocity as ControlVelocity
from tmdjax.models.control import FineTunedVelocity as FineTunedVelocity
from tmdjax.models.control import ObservationFeatures as ObservationFeatures
from tmdjax.models.control import solve_action as solve_action
from tmdjax.models.decoder.cache import cache_bytes as cache_bytes
from tmdjax.models.decoder.cache import decode as decode
from tmdjax.models.decoder.cache import fuse_projections as fuse_projections
from tmdjax.models.decoder.cache import init_cache as init_cache
from tmdjax.models.decoder.cache import prefill as prefill
from tmdjax.models.decoder.cache import prepare_weights as prepare_weights
from tmdjax.models.decoder.config import DecoderConfig as DecoderConfig
from tmdjax.models.decoder.network import Decoder as Decoder
from tmdjax.models.decoder.non_finite import first_non_finite as first_non_finite
from tmdjax.models.decoder.rope import RopeScaling as RopeScaling
from tmdjax.models.decoder.token_log_probs import entropy_of as entropy_of
from tmdjax.models.decoder.token_log_probs import log_prob_of as log_prob_of
from tmdjax.models.decoder.token_log_probs import token_entropies as token_entropies
from tmdjax.models.decoder.token_log_probs import token_log_probs as token_log_probs
from tmdjax.models.decoder.token_log_probs import (
    token_log_probs_from_hidden as token_log_probs_from_hidden,
)
from tmdjax.models.fields import FNO as FNO
from tmdjax.models.fields import DilatedResNet as DilatedResNet
from tmdjax.models.flow_equivariant.egocentric_map import (
    EgocentricMap as EgocentricMap,
)
from tmdjax.models.flow_equivariant.egocentric_map import (
    EgocentricState as EgocentricState,
)
from tmdjax.models.flow_equivariant.equivariance import (
    check_equivariance as check_equivariance,
)
from tmdjax.models.flow_equivariant.equivariance import (
    equivariance_errors as equivariance_errors,
)
from tmdjax.models.flow_equivariant.torus_map import TorusMap as TorusMap
from tmdjax.models.flow_equivariant.torus_map import TorusState as TorusState
from tmdjax.models.images.classifier import Classifier as Classifier
from tmdjax.models.images.dit import DiT as DiT
from tmdjax.models.images.text_dit import TextDiT as TextDiT
from tmdjax.models.images.text_dit import TextEncoder as TextEncoder
from tmdjax.models.images.text_dit import null_condition as null_condition
from tmdjax.models.images.unet import UNet as UNet
from tmdjax.models.layers import ClassEmbedding as ClassEmbedding
from tmdjax.models.layers import Dense as Dense
from tmdjax.models.layers import ScalarEmbedding as ScalarEmbedding
from tmdjax.models.layers import TimeEmbedding as TimeEmbedding
from tmdjax.models.layers import layer_norm as layer_norm
from tmdjax.models.layers import patchify as patchify
from tmdjax.models.layers import position_embedding_2d as position_embedding_2d
from tmdjax.models.layers import timestep_embedding as timestep_embedding
from tmdjax.models.layers import unpatchify as unpatchify
from tmdjax.models.mlp import VelocityMLP as VelocityMLP
from tmdjax.models.videos.discriminator import VideoDiscriminator as VideoDiscriminator
from tmdjax.models.videos.discriminator import default_taps as default_taps
from tmdjax.models.videos.dit import WAN_1_3B as WAN_1_3B
from tmdjax.models.videos.dit import WAN_14B as WAN_14B
from tmdjax.models.videos.dit import VideoDiT as VideoDiT
from tmdjax.models.videos.flow_maps import SplitDiT as SplitDiT
from tmdjax.models.videos.flow_maps import TwoTimeDiT as TwoTimeDiT
from tmdjax.models.videos.flow_maps import student_from_teacher as student_from_teacher
from tmdjax.models.videos.forcing_dit import ForcingDiT as ForcingDiT
from tmdjax.models.videos.forcing_dit import ForcingState as ForcingState
from tmdjax.models.videos.patches import patchify_video as patchify_video
from tmdjax.models.videos.patches import rotary_tables as rotary_tables
from tmdjax.models.videos.patches import unpatchify_video as unpatchify_video
from tmdjax.models.videos.rssm import RSSM as RSSM
from tmdjax.models.videos.rssm import RSSMState as RSSMState
from tmdjax.models.wrappers import from_nnx as from_nnx
from tmdjax.models.wrappers import rectified_flow as rectified_flow
