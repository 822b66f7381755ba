"""Experiment machinery: configs, stages, runs, claims, records, logs and reports."""

from tmdjax.harness.config import ConfigError as ConfigError
from tmdjax.harness.config import load_config as load_config
from tmdjax.harness.experiment import Experiment as Experiment
from tmdjax.harness.experiment import Report as Report
from tmdjax.harness.experiment import Update as Update
from tmdjax.harness.experiment import check_experiment as check_experiment
from tmdjax.harness.load import load as load
from tmdjax.harness.runner import Options as Options
from tmdjax.harness.runner import Outcome as Outcome
from tmdjax.harness.runner import check_run as check_run
from tmdjax.harness.runner import dry_run as dry_run
from tmdjax.harness.runner import run as run
from tmdjax.harness.stages import Paused as Paused
from tmdjax.harness.stages import Stage as Stage
from tmdjax.harness.stages import StageContext as StageContext
from tmdjax.harness.stages import StageResult as StageResult
