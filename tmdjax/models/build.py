"""Networks by name, and as pure functions of their parameters."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tmdjax.core.prng import check_key
from tmdjax.core.registry import Registry, suggestion
from tmdjax.core.types import ApplyFn, Params
from tmdjax.models.control import ControlMLP, ControlVelocity, FineTunedVelocity
from tmdjax.models.decoder.network import Decoder
from tmdjax.models.fields import FNO, DilatedResNet
from tmdjax.models.flow_equivariant.egocentric_map import EgocentricMap
from tmdjax.models.flow_equivariant.torus_map import TorusMap
from tmdjax.models.images.classifier import Classifier
from tmdjax.models.images.dit import DiT
from tmdjax.models.images.text_dit import TextDiT
from tmdjax.models.images.unet import UNet
from tmdjax.models.mlp import VelocityMLP
from tmdjax.models.videos.discriminator import VideoDiscriminator
from tmdjax.models.videos.dit import VideoDiT
from tmdjax.models.videos.flow_maps import SplitDiT, TwoTimeDiT
from tmdjax.models.videos.forcing_dit import ForcingDiT
from tmdjax.models.videos.rssm import RSSM
from tmdjax.quant import RECIPES, Recipe, as_recipe

MODELS: Registry[type[nn.Module]] = Registry("model")
MODELS.register("control_mlp")(ControlMLP)
MODELS.register("control_velocity")(ControlVelocity)
MODELS.register("decoder")(Decoder)
MODELS.register("dilated_resnet")(DilatedResNet)
MODELS.register("fine_tuned_velocity")(FineTunedVelocity)
MODELS.register("dit")(DiT)
MODELS.register("fno")(FNO)
MODELS.register("egocentric_map")(EgocentricMap)
MODELS.register("torus_map")(TorusMap)
MODELS.register("forcing_dit")(ForcingDiT)
MODELS.register("rssm")(RSSM)
MODELS.register("split_dit")(SplitDiT)
MODELS.register("two_time_dit")(TwoTimeDiT)
MODELS.register("video_discriminator")(VideoDiscriminator)
MODELS.register("text_dit")(TextDiT)
MODELS.register("mlp")(VelocityMLP)
MODELS.register("unet")(UNet)
MODELS.register("video_dit")(VideoDiT)
MODELS.register("classifier")(Classifier)


def build(spec: Mapping[str, Any]) -> nn.Module:
    """A module from ``{'name': ..., **attributes}``.

    Args:
        spec: the name of a model in ``MODELS`` and its attributes.

    Returns:
        The module, unbound.

    Raises:
        ValueError: no or an unknown name, an unknown or a missing attribute, or a
            value the model refuses.
        TypeError: an attribute of the wrong type.

    Example:
        >>> build({"name": "mlp", "hidden": 32, "depth": 2}).hidden
        32
    """
    if "name" not in spec:
        raise ValueError(
            f"a model needs a name, one of {', '.join(MODELS)}; got {sorted(spec)}."
        )
    kind = MODELS[spec["name"]]
    given = {  # a spec that was JSON has lists for tuples
        key: _attribute(value) for key, value in spec.items() if key != "name"
    }
    fields = {
        field.name: field
        for field in dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]
        if field.name not in ("name", "parent")
    }
    for key in given:
        if key not in fields:
            raise ValueError(
                f"model {spec['name']!r} has no attribute {key!r}; known: "
                f"{', '.join(sorted(fields))}.{suggestion(key, fields)}"
            )
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and name not in given
    ]
    if missing:
        raise ValueError(f"model {spec['name']!r} also needs {', '.join(missing)}.")
    return kind(**given)


def _attribute(value: Any) -> Any:
    if isinstance(value, Mapping) and value.get("name") in MODELS:
        return build(value)
    return tuple(value) if isinstance(value, list) else value


def spec_of(module: nn.Module) -> dict[str, Any]:
    """The spec from which :func:`build` makes an equal module.

    An attribute that is a module stands in it as its spec, a recipe as its name,
    another dataclass as a dict.

    Raises:
        ValueError: its class is not in ``MODELS``, or its recipe not in
            ``quant.RECIPES``.
    """
    names = [name for name in MODELS if MODELS[name] is type(module)]
    if not names:
        raise ValueError(
            f"{type(module).__name__} is not in models.MODELS; register it there."
        )
    fields = dataclasses.fields(module)  # pyright: ignore[reportArgumentType]
    attributes = [f.name for f in fields if f.name not in ("name", "parent")]
    return {"name": names[0]} | {k: _plain(getattr(module, k)) for k in attributes}


def _plain(value: Any) -> Any:
    if isinstance(value, Recipe):
        if value.name not in RECIPES or RECIPES[value.name] != value:
            raise ValueError(
                f"{value!r} is not quant.RECIPES[{value.name!r}], where a spec looks "
                f"for it; register it there."
            )
        return value.name
    if isinstance(value, nn.Module):
        return spec_of(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name)) for name in names}
    return value


def with_recipe(owner: Any, recipe: str | Recipe) -> Any:
    """The same network computed under another recipe; parameters fit both.

    What is inside follows; ``DecoderConfig.head_recipe``, where it is set, stays. Under
    the recipe that it has already a module comes out equal, and :func:`functional` then
    gives one and the same function.

    Args:
        owner: a module, a :class:`DecoderConfig`, a method of control: any dataclass
            with an attribute ``recipe``, or with an attribute that has one.
        recipe: a :class:`tmdjax.quant.Recipe`, or the name of one.

    Raises:
        ValueError: no recipe anywhere in it, or an unknown name.
    """
    found = _with_recipe(owner, as_recipe(recipe))
    if found is None:
        raise ValueError(
            f"{type(owner).__name__} has no attribute 'recipe' to set to "
            f"{as_recipe(recipe).name!r}; its precision is what it was written in."
        )
    return found


def _with_recipe(owner: Any, recipe: Recipe) -> Any:
    """A dataclass under another recipe, or None where there is none in it."""
    if isinstance(owner, Recipe | type) or not dataclasses.is_dataclass(owner):
        return None
    changes: dict[str, Any] = {"recipe": recipe} if hasattr(owner, "recipe") else {}
    for field in dataclasses.fields(owner):
        if field.name not in ("recipe", "parent"):
            inner = _with_recipe(getattr(owner, field.name), recipe)
            changes |= {} if inner is None else {field.name: inner}
    return dataclasses.replace(owner, **changes) if changes else None  # pyright: ignore


def functional(module: nn.Module) -> ApplyFn:
    """A module as ``apply_fn(params, *inputs, method=None, **options)``.

    ``params`` is a plain nested dict (linen's 'params' collection itself). A
    method is given by name, with its static options as keywords:
    ``apply_fn(params, h, c, method='blocks', start=2)``. Equal modules give one and
    the same function, so what is compiled for one serves the other.
    """
    try:
        return _functional(module)
    except TypeError:  # a module with attributes that do not hash
        return _functional.__wrapped__(module)


@functools.lru_cache(maxsize=128)
def _functional(module: nn.Module) -> ApplyFn:
    def apply_fn(
        params: Params, *inputs: Any, method: str | None = None, **options: Any
    ) -> Any:
        return module.apply({"params": params}, *inputs, method=method, **options)

    return apply_fn


def init_params(module: nn.Module, key: Any, *inputs: Any) -> dict[str, Any]:
    """Draws parameters in one compiled program, without the forward pass.

    Args:
        module: a linen module.
        key: typed key.
        *inputs: example inputs, arrays, numbers or ``jax.ShapeDtypeStruct``; None
            where an input may be None.

    Returns:
        A plain nested dict of float32 arrays. Under ``jax.eval_shape`` (close over
        the inputs or pass them) nothing is allocated.

    Raises:
        TypeError: the key is not typed.
    """
    check_key(key)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), inputs
    )
    return jax.jit(lambda key: dict(module.lazy_init(key, *shapes)["params"]))(key)
