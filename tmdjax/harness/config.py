"""Experiment configs: files with tiers, strict overrides, hashes, differences.

A config file defines ``TIERS: tuple[str, ...]`` and ``get_config(tier)``, which
returns an ``ml_collections.ConfigDict``. Every error here is a ``ConfigError``
of one line that names the key, what was given and what is expected, and it comes
before anything is compiled.
"""

import ast
import difflib
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from ml_collections import ConfigDict, config_dict

from tmdjax.core.files import json_of, write_atomically
from tmdjax.core.registry import suggestion
from tmdjax.harness import ranges
from tmdjax.harness.claims import keep_arms, keep_claims
from tmdjax.harness.find import use_folder

_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}
_NOT_FINITE = ("nan", "inf", "-inf")
# A quoted string, or else one character.
_TOKEN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|.""", re.DOTALL)


class ConfigError(ValueError):
    """What is wrong with a config, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads one tier of a config file and applies overrides.

    The type of the existing field decides how an override is read: ``true`` or
    ``false`` for a bool, a whole number for an int, any number for a float, text
    without quotes for a str. A tuple ``(1, 2)`` (brackets optional) keeps its
    length and the types of its elements; a list may change its length. Fields
    declared with ``config_dict.placeholder(type)``, and those whose range says so,
    also take ``none``. Every number must lie in its range, see
    :mod:`tmdjax.harness.ranges`.

    Args:
        spec: ``'configs/x.py:tier'``.
        overrides: ``'a.b=value'`` each (from ``--config.a.b=value``); the last of
            several for one key wins.

    Returns:
        The locked config.

    Raises:
        ConfigError: the file, the tier, a key or a value is wrong, or a number
            outside its range; or a required placeholder was left empty.
    """
    path, tier = _split_spec(spec)
    module = load_module(path)
    tiers = ", ".join(module.TIERS)
    if not tier:
        raise ConfigError(
            f"config {spec!r} names no tier; write {path}:{module.TIERS[0]} "
            f"(tiers: {tiers})."
        )
    if tier not in module.TIERS:
        raise ConfigError(
            f"{path} has no tier {tier!r}; its tiers: {tiers}."
            f"{suggestion(tier, module.TIERS)}"
        )
    try:
        config = module.get_config(tier)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"get_config({tier!r}) of {path} raised {_describe(error)}"
        ) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"get_config({tier!r}) of {path} returned {type(config).__name__}; "
            f"it must return an ml_collections.ConfigDict."
        )
    own = getattr(module, "RANGES", {})
    if not isinstance(own, Mapping):
        raise ConfigError(f"RANGES of {path} is {own!r}; give a dict of rules by name.")
    for override in overrides:
        _apply(config, override, own)
    to_plain(config)
    fields = _fields(config).items()
    try:
        bad = ranges.refused({key: held[name] for key, (held, name) in fields}, own)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"RANGES of {path}: {error}") from error
    if bad:
        raise ConfigError(
            f"{'; '.join(bad)}. Give another value (--config.KEY=VALUE), or state "
            f"another range in RANGES of {path}."
        )
    return config.lock()


def to_plain(tree: Any) -> Any:
    """A copy that JSON can hold: plain dicts, tuples as lists, numpy scalars unboxed.

    Values that JSON lacks become the strings 'nan', 'inf' and '-inf';
    :func:`from_plain` reads them back.

    Args:
        tree: a ConfigDict, or nested mappings, lists and tuples of bool, int,
            float, str and None.

    Raises:
        ConfigError: a value of another type, or a required placeholder without a
            value; names the key.
    """
    return _to_plain(tree, "")


def from_plain(plain: Any) -> Any:
    """Reads 'nan', 'inf' and '-inf' back as floats; tuples stay lists."""
    if isinstance(plain, Mapping):
        return {name: from_plain(value) for name, value in plain.items()}
    if isinstance(plain, list):
        return [from_plain(value) for value in plain]
    if isinstance(plain, str) and plain in _NOT_FINITE:
        return float(plain)
    return plain


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes plain values as an indented JSON file, atomically.

    Raises:
        ConfigError: :func:`to_plain` has no form for a value; names its key.
        OSError: the file cannot be written.
    """
    write_atomically(path, json_text(value))


def json_text(value: Any) -> bytes:
    """Plain values as :func:`write_json` writes them.

    Raises:
        ConfigError: :func:`to_plain` has no form for a value; names its key.
    """
    text = json.dumps(to_plain(value), indent=1, allow_nan=False)
    return f"{text}\n".encode()


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads what :func:`write_json` wrote; tuples come back as lists.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or no plain file; names it.
    """
    return from_plain(json_of(path))


def flatten(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by dotted key, ``{'a.b': value}``; lists and empty groups are leaves."""
    flat = {}
    for name, value in plain.items():
        if isinstance(value, Mapping) and value:
            flat.update({f"{name}.{k}": v for k, v in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two plain configs, one line a key, sorted by key.

    Empty exactly if both have one :func:`config_hash`.

    Example:
        >>> differences({"train": {"steps": 100}}, {"train": {"steps": 200}})
        ['train.steps: 100 -> 200']
    """
    texts = [
        {key: _canonical(value) for key, value in flatten(plain).items()}
        for plain in (old, new)
    ]
    before, after = texts
    return [
        f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def config_hash(plain: Mapping[str, Any]) -> str:
    """The first 16 hex digits of the SHA-256 of a plain config's canonical JSON."""
    return hashlib.sha256(_canonical(plain).encode()).hexdigest()[:16]


def _canonical(plain: Any) -> str:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _split_spec(spec: str) -> tuple[Path, str]:
    name, _, tier = spec.partition(":")
    path = Path(name)
    if path.is_file():
        return path, tier
    if path.name and not path.suffix:
        path = path.with_suffix(".py")
    found = {
        file.stem: file.as_posix()
        for folder in (path.parent, Path("configs"))
        for file in sorted(folder.glob("*.py"))
        if not file.stem.startswith("_")
    }
    nearest = difflib.get_close_matches(path.stem, found, n=1, cutoff=0)
    hint = f"Did you mean {found[nearest[0]]!r}?" if nearest else ""
    raise ConfigError(
        f"config file {name!r} does not exist; write configs/<system>.py:<tier>. {hint}"
    )


def load_module(path: Path) -> ModuleType:
    """Imports a config file and makes the other modules of its folder importable.

    Raises:
        ConfigError: it fails, or lacks TIERS or get_config.
    """
    use_folder(path.parent)
    name = f"_tmdjax_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"config file {str(path)!r} is not a Python file (.py).")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"{path} failed at import: {_describe(error)}") from error
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(
            f"{path} defines no get_config; add `def get_config(tier) -> ConfigDict`."
        )
    tiers = getattr(module, "TIERS", None)
    if not (isinstance(tiers, tuple) and tiers and all(map(_is_text, tiers))):
        raise ConfigError(
            f"{path} must define TIERS, a tuple of names such as ('smoke', 'cpu'); "
            f"it has {tiers!r}."
        )
    return module


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _to_plain(value: Any, key: str) -> Any:
    if isinstance(value, ConfigDict | Mapping):
        plain = {}
        for name in value:
            child = f"{key}.{name}" if key else str(name)
            try:
                plain[str(name)] = _to_plain(value[name], child)
            except config_dict.RequiredValueError:
                raise ConfigError(
                    f"{child} has no value yet; give --config.{child}=<value>."
                ) from None
        return plain
    if isinstance(value, list | tuple):
        return [_to_plain(v, f"{key}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"{key} is of type {type(value).__name__}; allowed are bool, int, float, str, "
        f"None, and tuples, lists and dicts of these. Write it as text."
    )


def _fields(config: ConfigDict, prefix: str = "") -> dict[str, tuple[ConfigDict, str]]:
    """The holder and the name of every setting, by dotted key."""
    fields = {}
    for name, value in config.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            fields.update(_fields(value, f"{prefix}{name}."))
        else:
            fields[f"{prefix}{name}"] = (config, name)
    return fields


def _nearest(key: str, keys: Iterable[str]) -> str:
    """A suggestion by the whole key, or else by its last part."""
    found = suggestion(key, keys)
    if found:
        return found
    leaf = key.rpartition(".")[2]
    by_leaf = {other.rpartition(".")[2]: other for other in keys}
    near = difflib.get_close_matches(leaf, by_leaf, n=1)
    return f" Did you mean {by_leaf[near[0]]!r}?" if near else ""


def _add_to_group(config: Any, key: str, text: str, fields: Mapping[str, Any]) -> bool:
    """Adds a setting that is not there but may be given, if the key is that of one.

    ``arms.ARM.GROUP.SETTING`` is of the type that GROUP.SETTING has for all arms; where
    the arm's group has another 'name', it has no such setting. Any setting of a group
    'method' may be given: the method's preset alone knows them, so its type is guessed.
    """
    holder, parts = config, key.split(".")
    if parts[0] == "arms" and len(parts) == 4 and parts[1] in config.get("arms", {}):
        holder, parts = config["arms"][parts[1]], parts[2:]
    group, name = parts if len(parts) == 2 else ("", "")
    own = holder.get(group, ConfigDict())
    if group == "method" and (group in holder or holder is not config):
        items = _split_items(text) if text[:1] in ("(", "[") else None
        value = _guess(text) if items is None else tuple(map(_guess, items))
    elif f"{group}.{name}" in fields and holder is not config:
        named = config[group].get("name")
        if own.get("name", named) != named:
            return False
        value = dict(config[group].items(preserve_field_references=True))[name]
        if isinstance(value, config_dict.FieldReference):
            value = config_dict.placeholder(value.get_type())
    else:
        return False
    holder[group] = own
    holder[group][name] = value
    return True


def _apply(config: ConfigDict, override: str, own: Mapping[str, str]) -> None:
    key, equals, text = override.partition("=")
    fields = _fields(config)
    if not equals:
        raise ConfigError(
            f"--config.{key} has no value; write --config.{key}=<value>."
            f"{'' if key in fields else _nearest(key, fields)}"
        )
    given = f"--config.{key}={text}"
    keep = {"arms": keep_arms, "claims": keep_claims}.get(key)
    if keep is not None and key in config:
        try:
            return keep(config, filter(None, text.split(",")))
        except ValueError as error:
            raise ConfigError(f"{given}: {error}") from None
    try:
        if key not in fields and _add_to_group(config, key, text, fields):
            fields = _fields(config)
    except ValueError as error:
        raise ConfigError(f"{given}: {key} expects {error}, got {text!r}.") from None
    if key not in fields:
        inside = [other for other in fields if other.startswith(f"{key}.")]
        if inside:
            raise ConfigError(
                f"{given}: {key!r} is a group of settings, not one; set one of "
                f"{', '.join(inside)}."
            )
        groups = [other for other in fields if other.count(".") == 1]
        arms: Any = config.get("arms", {})
        known = {f"arms.{arm}.{k}" for arm in arms for k in groups}
        known = [*fields, *sorted(known - {key})]
        raise ConfigError(
            f"{given}: there is no setting {key!r}.{_nearest(key, known)}"
        )
    holder, name = fields[key]
    field = dict(holder.items(preserve_field_references=True))[name]
    kind, value, optional = type(field), field, False
    if isinstance(field, config_dict.FieldReference):
        kind, optional = field.get_type(), True
        value = None if field.empty() else field.get()
    optional = optional or (ranges.rule_of(key, own) or "").endswith(" or none")
    if (optional or field is None) and text.lower() == "none":
        holder[name] = None
        return
    try:
        holder[name] = _parse(text, kind, value)
    except (TypeError, ValueError) as error:
        allowed = f"{error} or none" if optional else str(error)
        raise ConfigError(
            f"{given}: {key} expects {allowed}, got {text!r}; it is {value!r} now."
        ) from None


def _parse(text: str, kind: Any, value: Any) -> Any:
    """Reads text as the kind of a field; raises ValueError(what is expected)."""
    if kind in _EXPECTED:
        return _parse_scalar(text, kind)
    if kind in (tuple, list):
        return _parse_sequence(text, kind, value)
    raise ValueError(
        f"a value of type {getattr(kind, '__name__', kind)}, which the command line "
        f"cannot give (declare it as config_dict.placeholder(int), say)"
    )


def _parse_scalar(text: str, kind: type) -> Any:
    if kind is str and text in _NOT_FINITE:
        raise ValueError("a text that is not kept for numbers, as 'inf' is")
    if kind is str:
        return text
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.strip().lower()]
        value = kind(text)
    except (KeyError, ValueError):
        raise ValueError(_EXPECTED[kind]) from None
    if value != value:
        raise ValueError(_EXPECTED[kind])
    return value


def _parse_sequence(text: str, kind: type, value: Any) -> Any:
    items = _split_items(text)
    if items is None:
        raise ValueError("values between matching brackets")
    if kind is tuple and value is not None:
        if len(items) != len(value):
            raise ValueError(f"{len(value)} value(s) in brackets")
        examples = list(value)
    elif value:
        examples = [value[0]] * len(items)
    else:
        return kind(_guess(item) for item in items)
    parsed = []
    for i, (item, example) in enumerate(zip(items, examples)):
        try:
            parsed.append(_parse(_unquote(item, example), type(example), example))
        except ValueError as error:
            raise ValueError(f"{error} at position {i}") from None
    return kind(parsed)


def _split_items(text: str) -> list[str] | None:
    """Splits at the commas outside brackets and quotes; None if brackets differ."""
    items = _split_commas(text)
    if items and len(items) == 1 and re.fullmatch(r"\(.*\)|\[.*\]", items[0], re.S):
        items = _split_commas(items[0][1:-1])
    return items


def _split_commas(text: str) -> list[str] | None:
    items, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token in ("(", "[")) - (token in (")", "]"))
        if token == "," and depth == 0:
            items.append("")
        else:
            items[-1] += token
    if depth:
        return None
    items = [item.strip() for item in items]
    return items if items[-1] else items[:-1]


def _unquote(item: str, example: Any) -> str:
    if isinstance(example, str) and re.fullmatch(r"'.*'|\".*\"", item, re.S):
        try:
            return ast.literal_eval(item)
        except (SyntaxError, ValueError):
            raise ValueError("text in proper quotes") from None
    return item


def _guess(item: str) -> Any:
    """A value whose type nothing in the config tells.

    Raises:
        ValueError: NaN, which no setting may be.
    """
    if item.lower() == "none":
        return None
    if item.lower() == "nan":
        raise ValueError("a number, text or none")
    for kind in (bool, int, float):
        try:
            return _parse_scalar(item, kind)
        except ValueError:
            continue
    return _unquote(item, item)
