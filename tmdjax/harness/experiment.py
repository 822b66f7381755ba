"""What an experiment is: the members that the runner and the commands call.

A module of ``experiments/``, or any object, with the members of :class:`Experiment`.
Those in ``REQUIRED`` must be there; of the others, what stands here is the default.
"""

import contextlib
import dataclasses
import functools
import inspect
import pathlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tmdjax.core.checks import check_choice
from tmdjax.harness.claims import MAIN_ARM, PAIRINGS, metric_name
from tmdjax.harness.config import ConfigError
from tmdjax.harness.stages import Stage, StageResult

Config = Any
"""A locked ``ConfigDict``, as :func:`tmdjax.harness.load_config` returns it."""

REQUIRED = ("stages", "describe", "measures")


@dataclasses.dataclass(frozen=True)
class Report:
    """What an experiment shows of one unit.

    Attributes:
        tables: (caption, rows), printed and in report.html.
        figures: (caption, path of a PNG, GIF or HTML page, or None for one left out).
    """

    tables: list[tuple[str, list[dict[str, Any]]]] = dataclasses.field(
        default_factory=list
    )
    figures: list[tuple[str, pathlib.Path | None]] = dataclasses.field(
        default_factory=list
    )

    def __add__(self, other: "Report") -> "Report":
        """Both, one after the other."""
        return Report(self.tables + other.tables, self.figures + other.figures)

    def of(self, whose: str) -> "Report":
        """The same, its captions saying whose it is."""
        tables = [(f"{caption} ({whose})", rows) for caption, rows in self.tables]
        return Report(tables, [(f"{c} ({whose})", path) for c, path in self.figures])


class Update(NamedTuple):
    """A compiled step of an experiment, from shapes alone.

    Attributes:
        step: a function that can be traced; not yet jitted.
        shapes: of its arguments, of which the second is the batch.
        donated: the numbers of the arguments that it may write over.
    """

    step: Any
    shapes: tuple[Any, ...]
    donated: int | tuple[int, ...]


@runtime_checkable
class Experiment(Protocol):
    """Stages under some arms and seeds, what they measure, and what is shown of them.

    A unit is one arm under one seed; shards of a run share the units out. Functions
    must refuse settings that cannot work (ValueError) before anything is compiled.

    Attributes:
        PAIRING: 'separate', or 'vmapped' where a stage trains all seeds of an arm side
            by side; those then stay in one shard.
        CURVES: what is drawn of the log of a stage that trains, over all arms and
            seeds: the name of the axis by column. A column that a log has by seed is
            called 'NAME.seed0' and so on there.
        MEANINGS: a sentence for each measure, with its unit: by the name of a metric
            after its last dot, or by the name of a column of :meth:`summary_rows`.
        RULES: by which ``experiments.plan`` cuts parameters over a mesh, in the form
            of :data:`tmdjax.train.DECODER_RULES`.
    """

    PAIRING: str = "separate"
    CURVES: Mapping[str, str] = types.MappingProxyType({"loss": "loss"})
    MEANINGS: Mapping[str, str] = types.MappingProxyType({})
    RULES: Sequence[Any] = ()

    def stages(self, config: Config, arm: str) -> list[Stage]:
        """The stages of one arm; a stage stands after those whose results it reads."""
        ...

    def report(
        self,
        config: Config,
        arm: str,
        results: Mapping[str, StageResult],
        folder: pathlib.Path,
    ) -> Report:
        """What only one unit can show, such as samples: of the first seed of each arm.

        The captions are completed by the arm and the seed. What all units measure
        (:meth:`summary_rows`, :meth:`summary_figures`) and how they learned (CURVES) is
        shown anyway.

        Args:
            config: of the run.
            arm: of the unit.
            results: by stage; the last stages are absent under ``--stage``.
            folder: where figures go, one an arm; it may not exist yet.
        """
        return Report()

    def describe(self, config: Config) -> dict[str, Any]:
        """Sizes by name, found without allocating or training anything.

        Raises:
            ValueError: settings that cannot work.
        """
        ...

    def measures(self, config: Config, arm: str) -> set[str]:
        """The metrics that every unit of an arm will have; there may be more.

        A claim about others is refused before the run.
        """
        ...

    def arms(self, config: Config) -> Sequence[str]:
        """The names of the arms.

        Arms that the config lists in ``one_seed_arms`` (ablations) run under the first
        seed alone.
        """
        return (MAIN_ARM,)

    def summary_rows(
        self, config: Config, found: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """The table of a run in its report, and of a record in README and docs.

        Args:
            config: of the run.
            found: what was measured, named as
                :func:`tmdjax.harness.claims.metric_name` says: means over seeds with
                their intervals, :class:`tmdjax.metrics.intervals.Interval`, which may
                stand in a cell. Of arms that are still to run there is nothing.
        """
        return [{"metric": name, "value": value} for name, value in found.items()]

    def summary_figures(
        self, config: Config, found: Mapping[str, Any], folder: pathlib.Path
    ) -> list[tuple[str, pathlib.Path | None]]:
        """Figures of all units together: (caption, path), as in a :class:`Report`.

        Args:
            config: of the run.
            found: as in :meth:`summary_rows`.
            folder: where figures go; it may not exist yet.
        """
        return []

    def seeds(self, config: Config, arm: str) -> Sequence[int] | None:
        """The seeds that an arm can be run under, where its config names them."""
        return None

    def updates(self, config: Config) -> Mapping[str, Update]:
        """The steps whose memory and FLOPs ``experiments.plan`` asks the compiler."""
        return {}


def check_experiment(given: Any) -> Experiment:
    """An experiment from a module or object, complete and of the right shape.

    Args:
        given: has the members of :class:`Experiment`; others are its own.

    Raises:
        TypeError: a member is missing, or does not take what it is called with.
        ValueError: PAIRING is unknown.
    """
    name = getattr(given, "__name__", type(given).__name__)
    missing = [member for member in REQUIRED if not hasattr(given, member)]
    if missing:
        raise TypeError(
            f"{name} is no experiment: it lacks {', '.join(missing)}. Define what "
            f"tmdjax.harness.Experiment names."
        )
    found: Any = types.SimpleNamespace()
    for member, default in vars(Experiment).items():
        if member.startswith("_"):
            continue
        value = functools.partial(default, None) if callable(default) else default
        if hasattr(given, member):
            value = getattr(given, member)
            if callable(default):
                _check_call(f"{name}.{member}", value, default)
        setattr(found, member, value)
    check_choice(f"{name}.PAIRING", found.PAIRING, PAIRINGS)
    return found


def measured(experiment: Experiment, config: Config) -> set[str]:
    """The metrics that the summary of a run will have; claims may be about them."""
    return {
        metric_name(arm, name)
        for arm in experiment.arms(config)
        for name in experiment.measures(config, arm)
    }


@contextlib.contextmanager
def missing_settings_named() -> Iterator[None]:
    """Makes a ConfigError of reading a setting that the config lacks."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        # a ConfigDict raises AttributeError(KeyError(name))
        cause = error if isinstance(error, KeyError) else next(iter(error.args), None)
        if not isinstance(cause, KeyError):
            raise
        name = str(cause.args[0]).split("\n")[0].strip("'\"")
        raise ConfigError(
            f"the experiment reads the setting {name!r}, which the config lacks."
        ) from error


def _check_call(name: str, function: Any, contract: Any) -> None:
    """Refuses what cannot be called with the positional arguments of a contract."""
    arguments = list(inspect.signature(contract).parameters)[1:]
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise TypeError(
            f"{name} is called with ({', '.join(arguments)}): {error}."
        ) from None
