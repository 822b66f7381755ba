"""Arms of an experiment: what each changes of the config, and the method it names.

``config.arms`` is ``{arm: {group: {setting: value}}}``. A group is one of the config,
such as 'train', and an arm has its settings over those of all. The group 'method' holds
a 'name', ``"SYSTEM"`` or ``"SYSTEM:PRESET"``, and what is changed of that preset: a new
method is a file with a function ``preset`` in ``tmdjax/systems/`` or beside the config.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict

from tmdjax import quant, systems
from tmdjax.core.checks import check_choice
from tmdjax.core.registry import suggestion
from tmdjax.harness import ConfigError, Stage
from tmdjax.harness.claims import MAIN_ARM
from tmdjax.harness.config import from_plain, to_plain
from tmdjax.harness.find import find_module
from tmdjax.harness.stages import of_other_arm

T = TypeVar("T")
METHOD = "method"
NO_GROUPS = ("arms", "claims")
CPU_TIERS = ("smoke", "cpu")
"""Tiers for machines without float8 products, which are emulated there by default."""
ALIKE = "optimizer"
"""The group with the same settings under every 'name'."""


def arms(config: Any) -> tuple[str, ...]:
    """Names of a config's arms; ('main',) where it has none."""
    return tuple(config.get("arms", ())) or (MAIN_ARM,)


def of_arm(config: Any, arm: str) -> Any:
    """The config of an arm: its own settings over those of all.

    A group with another 'name' than the config's (another task, environment or data
    set) stands in its place, for what it names has settings of its own; name there all
    that is not to be a default. In any other group, and of the optimiser, an arm may
    change what the config has, also in groups within it. Settings of the method are
    left to the preset, which knows them.

    Args:
        config: a ConfigDict; one without arms is returned as it is.
        arm: one of :func:`arms`.

    Raises:
        ConfigError: an unknown group or setting, or a value of another type than the
            config's.
        ValueError: an unknown arm.
    """
    if not config.get("arms"):
        return config
    check_choice("arm", arm, config.arms)
    if not isinstance(config.arms[arm], ConfigDict):
        raise ConfigError(
            f"arms.{arm}={config.arms[arm]!r} is no arm; one is "
            f"{{group: {{setting: value}}}}, and {{}} where it changes nothing."
        )
    own = config.copy_and_resolve_references()
    groups = [k for k, v in config.items() if isinstance(v, ConfigDict)]
    groups = [k for k in groups if k not in (*NO_GROUPS, METHOD)]
    with own.unlocked():
        for group, changes in config.arms[arm].items():
            if group not in (*groups, METHOD) or not isinstance(changes, ConfigDict):
                raise ConfigError(
                    f"arms.{arm}.{group} is no group of settings; an arm changes those "
                    f"of {', '.join((*groups, METHOD))}.{suggestion(group, groups)}"
                )
            where, given = f"arms.{arm}.{group}", own.get(group, ConfigDict())
            if group == ALIKE and "name" in changes:
                given = ConfigDict({**given, "name": changes.name})
            own[group] = _changed(where, given, changes, free=group == METHOD)
    return own


def _changed(where: str, given: Any, changes: Any, free: bool = False) -> ConfigDict:
    """A group with an arm's changes; ``free``: any setting, of any type."""
    if changes.get("name", given.get("name")) != given.get("name"):
        return ConfigDict(changes)
    if free:
        return ConfigDict({**given, **changes})
    found = ConfigDict(given)
    for name, value in changes.items():
        if name not in given:
            raise ConfigError(
                f"{where}.{name} changes no setting; there are {', '.join(given)}."
                f"{suggestion(name, given)}"
            )
        if isinstance(value, ConfigDict) and isinstance(given[name], ConfigDict):
            value = _changed(f"{where}.{name}", given[name], value)
        try:
            found[name] = value
        except TypeError:
            raise ConfigError(
                f"{where}.{name}={to_plain(value)!r} is of another type than "
                f"{to_plain(given[name])!r}, which the config has."
            ) from None
    return found


def baseline_stages(
    arm: str,
    baseline: str,
    stages: Callable[[Any, str], Sequence[Stage]],
    config: Any,
    last: str,
) -> tuple[list[Stage], str]:
    """The stages of a baseline that an arm lists before it is measured against them.

    Args:
        arm: that is measured.
        baseline: the arm that it is measured against, which may be the same.
        stages: ``(config, arm)``, of the experiment.
        config: of the experiment.
        last: the name of the stage whose result is read.

    Returns:
        Those that ``last`` of the baseline needs, itself included, none where the two
        arms are one; and the id of ``last`` there, a parent of the stage that measures.
    """
    if baseline == arm:
        return [], last
    found = of_other_arm(baseline, stages(config, baseline), last)
    return found, found[-1].id


def check_devices(
    config: Any, tier: str, *, allow_emulation: bool = False
) -> dict[str, str]:
    """Refuses recipes of any arm that the device has no products for.

    Args:
        config: with a group 'precision', or without. ``precision.allow_emulation``,
            where a config has it, stands in the place of the argument.
        tier: of the config; those of CPU_TIERS may always emulate.
        allow_emulation: whether float8 products may be computed in float32 on a device
            that has none, which is slower than bfloat16 and gives the same numbers.

    Returns:
        Labels of a run: ``{"float8": "emulated in float32"}``, which is printed too,
        where any 8-bit product is computed so, be it that the device has none or that
        the recipe does not use them; or none.

    Raises:
        ConfigError: 8 bits on a device without float8 products, where emulation is not
            allowed; arm, recipe and device are named.
        ValueError: an unknown recipe.
        RuntimeError: the device does not round as it is told to.
    """
    emulated = []
    for arm in arms(config):
        own = to_plain(of_arm(config, arm)).get("precision")
        if own is None:
            continue
        may = allow_emulation or tier in CPU_TIERS
        precision = quant.Precision(**{"allow_emulation": may, **own})
        try:
            if quant.check_precision(precision):
                emulated.append(arm)
        except ValueError as error:
            raise ConfigError(
                f"arm {arm!r}: {error} Here that is --allow_emulation; the tiers "
                f"{' and '.join(CPU_TIERS)} have it unless precision.allow_emulation "
                f"of their config says otherwise."
            ) from None
    if not emulated:
        return {}
    print(
        f"[precision] 8-bit products are emulated in float32, slower than bf16 "
        f"({', '.join(emulated)})"
    )
    return {"float8": "emulated in float32"}


def build_method(
    method: Mapping[str, Any], kind: type[T], *arguments: Any, **options: Any
) -> T:
    """The method that an arm names, made by the preset of its system.

    Args:
        method: the group 'method' of an arm: 'name', ``"SYSTEM:PRESET"``, or
            ``"SYSTEM"`` for the preset of that name; the rest are changes of the
            preset. Lists become tuples.
        kind: what presets of this family of methods return.
        *arguments: of the preset, after its name.
        **options: of the preset, beside the changes.

    Raises:
        ConfigError: no name, no such system, a system without a preset, a setting that
            stands among ``options`` too, or a method of another family.
        ValueError: an unknown preset, or settings that it refuses.
    """
    given = tuples(method)
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(
            f"method.name={name!r}: name the method's system, such as 'grpo', or a "
            f"preset of it, such as 'grpo:dapo'."
        )
    system, _, preset = name.partition(":")
    make = getattr(find_module(system, systems.__name__), "preset", None)
    if make is None:
        known = _systems()
        raise ConfigError(
            f"method.name={name!r}: neither tmdjax/systems/{system}.py nor {system}.py "
            f"beside the config has a function preset(name, ...); systems with one: "
            f"{', '.join(known)}.{suggestion(system, known)}"
        )
    for setting in sorted(given.keys() & options.keys()):
        raise ConfigError(
            f"method.{setting} of {name!r}: the experiment gives {', '.join(options)} "
            f"from other groups of the config; change it there."
        )
    try:
        inspect.signature(make).bind(preset or system, *arguments, **options, **given)
    except TypeError as error:
        raise ConfigError(
            f"method.name={name!r} is no {kind.__name__}: its preset"
            f"{inspect.signature(make)} cannot be called ({error})."
        ) from None
    found = make(preset or system, *arguments, **options, **given)
    if not isinstance(found, kind):
        raise ConfigError(
            f"method.name={name!r} makes a {type(found).__name__}, and this experiment "
            f"needs a {kind.__name__}; name a method of its family."
        )
    return found


def tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings as dataclasses want them: tuples for lists, infinity for 'inf'."""
    found = from_plain(settings)
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}


def fields_given(settings: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Of a group of settings, those that are fields of a dataclass and not None.

    What is None is as the dataclass, or a preset, has it.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    given = tuples(to_plain(settings))
    return {k: v for k, v in given.items() if k in names and v is not None}


def _systems() -> list[str]:
    """Systems of the package that have a preset."""
    names = [module.name for module in pkgutil.iter_modules(systems.__path__)]
    found = {n: importlib.import_module(f"{systems.__name__}.{n}") for n in names}
    return [n for n in names if hasattr(found[n], "preset")]
