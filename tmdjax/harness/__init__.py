"""Experiment machinery: configs, stages, runs, claims, records, logs and reports."""

from tmdjax.harness.config import ConfigError, load_config
from tmdjax.harness.experiment import Experiment, Report, Update, check_experiment
from tmdjax.harness.load import load
from tmdjax.harness.runner import Options, Outcome, check_run, dry_run, run
from tmdjax.harness.stages import Paused, Stage, StageContext, StageResult

__all__ = [
    "ConfigError",
    "Experiment",
    "Options",
    "Outcome",
    "Paused",
    "Report",
    "Stage",
    "StageContext",
    "StageResult",
    "Update",
    "check_experiment",
    "check_run",
    "dry_run",
    "load",
    "load_config",
    "run",
]
