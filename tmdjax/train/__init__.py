"""Training: state, update, optimiser, checkpoints, sharding, planner, loop."""

from tmdjax.train.checkpoint import CheckpointError as CheckpointError
from tmdjax.train.checkpoint import Checkpoints as Checkpoints
from tmdjax.train.checkpoint import Restored as Restored
from tmdjax.train.distillation import Distillation as Distillation
from tmdjax.train.distillation import DistillationConfig as DistillationConfig
from tmdjax.train.distillation import Networks as Networks
from tmdjax.train.distillation_cycle import DistillationState as DistillationState
from tmdjax.train.distillation_cycle import compile_cycle as compile_cycle
from tmdjax.train.distillation_cycle import (
    create_distillation_state as create_distillation_state,
)
from tmdjax.train.distillation_cycle import make_steps as make_steps
from tmdjax.train.export import load_model as load_model
from tmdjax.train.export import model_meta as model_meta
from tmdjax.train.export import save_model as save_model
from tmdjax.train.fine_tuning import FineTuned as FineTuned
from tmdjax.train.fine_tuning import fine_tune as fine_tune
from tmdjax.train.optimizer import OptimizerConfig as OptimizerConfig
from tmdjax.train.optimizer import make_optimizer as make_optimizer
from tmdjax.train.optimizer import make_schedule as make_schedule
from tmdjax.train.planning.devices import DEVICES as DEVICES
from tmdjax.train.planning.devices import Device as Device
from tmdjax.train.planning.devices import get_device as get_device
from tmdjax.train.planning.flops import count_flops as count_flops
from tmdjax.train.planning.mesh_search import check_fits as check_fits
from tmdjax.train.planning.plan import NOT_TOLD as NOT_TOLD
from tmdjax.train.planning.plan import StepPlan as StepPlan
from tmdjax.train.planning.plan import plan as plan
from tmdjax.train.sharding import DECODER_RULES as DECODER_RULES
from tmdjax.train.sharding import VIDEO_DIT_RULES as VIDEO_DIT_RULES
from tmdjax.train.sharding import abstract_mesh as abstract_mesh
from tmdjax.train.sharding import batch_sharding as batch_sharding
from tmdjax.train.sharding import fsdp_shardings as fsdp_shardings
from tmdjax.train.sharding import jit_train_step as jit_train_step
from tmdjax.train.sharding import make_mesh as make_mesh
from tmdjax.train.sharding import replicated as replicated
from tmdjax.train.state import TrainState as TrainState
from tmdjax.train.state import create_state as create_state
from tmdjax.train.state import ema_update as ema_update
from tmdjax.train.state import make_train_step as make_train_step
from tmdjax.train.state import nonfinite_report as nonfinite_report
from tmdjax.train.supervised import DataIterator as DataIterator
from tmdjax.train.supervised import FitResult as FitResult
from tmdjax.train.supervised import NoData as NoData
from tmdjax.train.supervised import NonFiniteError as NonFiniteError
from tmdjax.train.supervised import fit as fit
