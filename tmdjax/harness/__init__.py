"""Experiment machinery: stages, configs, logs, reports and the ledger."""

from tmdjax.harness.config import ConfigError, load_config
from tmdjax.harness.load import load
from tmdjax.harness.runner import Options, Outcome, Report, check_run, dry_run, run
from tmdjax.harness.stages import Paused, Stage, StageContext, StageResult

__all__ = [
    "ConfigError",
    "Options",
    "Outcome",
    "Paused",
    "Report",
    "Stage",
    "StageContext",
    "StageResult",
    "check_run",
    "dry_run",
    "load",
    "load_config",
    "run",
]
