"""Training: state, update, optimiser, checkpoints, sharding, planner, loop."""

from tmdjax.train.checkpoint import CheckpointError, Checkpoints, Restored
from tmdjax.train.distillation import Distillation, DistillationConfig, Networks
from tmdjax.train.distillation_cycle import (
    DistillationState,
    compile_cycle,
    create_distillation_state,
    make_steps,
)
from tmdjax.train.export import load_model, model_meta, save_model
from tmdjax.train.fine_tuning import FineTuned, fine_tune
from tmdjax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from tmdjax.train.planning.devices import DEVICES, Device, get_device
from tmdjax.train.planning.flops import count_flops
from tmdjax.train.planning.mesh_search import check_fits
from tmdjax.train.planning.plan import NOT_TOLD, Plan, plan
from tmdjax.train.sharding import (
    DECODER_RULES,
    VIDEO_DIT_RULES,
    abstract_mesh,
    batch_sharding,
    fsdp_shardings,
    jit_on_mesh,
    jit_train_step,
    make_mesh,
    replicated,
)
from tmdjax.train.state import (
    TrainState,
    create_state,
    ema_update,
    make_train_step,
    nonfinite_report,
)
from tmdjax.train.supervised import (
    DataIterator,
    FitResult,
    NoData,
    NonFiniteError,
    fit,
)

__all__ = [
    "DECODER_RULES",
    "DEVICES",
    "NOT_TOLD",
    "VIDEO_DIT_RULES",
    "CheckpointError",
    "Checkpoints",
    "DataIterator",
    "Device",
    "Distillation",
    "DistillationConfig",
    "DistillationState",
    "FineTuned",
    "FitResult",
    "Networks",
    "NoData",
    "NonFiniteError",
    "OptimizerConfig",
    "Plan",
    "Restored",
    "TrainState",
    "abstract_mesh",
    "batch_sharding",
    "check_fits",
    "compile_cycle",
    "count_flops",
    "create_distillation_state",
    "create_state",
    "ema_update",
    "fine_tune",
    "fit",
    "fsdp_shardings",
    "get_device",
    "jit_on_mesh",
    "jit_train_step",
    "load_model",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "make_steps",
    "make_train_step",
    "model_meta",
    "nonfinite_report",
    "plan",
    "replicated",
    "save_model",
]
