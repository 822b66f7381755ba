"""Temporary bytes of a program, by the CPU's compiler on simulated devices.

Run as a script this file is the other side: it reads an exported program from standard
input, compiles it for as many devices of a CPU as the program names, and prints what
the compiler's ``memory_analysis`` says.

A CPU computes in float32 what is written in 16 bits, and would need more room for it.
A program with such arrays is therefore compiled as its twin, in which every number is
twice as wide (bfloat16 becomes float32, float32 becomes float64, and so on, but for
bools), and half of the twin's bytes count: every buffer has its intended width.
"""

import dataclasses
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.extend import mlir

_WIDER = {
    "bf16": "f32",
    "f16": "f32",
    "f32": "f64",
    **{f"{sign}{n}": f"{sign}{2 * n}" for sign in ("i", "ui") for n in (8, 16, 32)},
}
_NUMPY = {
    "bf16": jnp.bfloat16,
    "f16": np.float16,
    **{f"f{n}": f"f{n // 8}" for n in (32, 64)},
    **{f"i{n}": f"i{n // 8}" for n in (8, 16, 32, 64)},
    **{f"ui{n}": f"u{n // 8}" for n in (8, 16, 32, 64)},
}
_TYPE = re.compile(r"tensor<((?:\d+x)*)(\w+)>")
_COMPLEX = re.compile(r"tensor<((?:\d+x)*)complex<f32>>")
_CONSTANT = re.compile(r'dense<("[^"]*"|[^">]*)> : tensor<((?:\d+x)*)(\w+)>')


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Bytes on one device, as the compiler has them.

    Attributes:
        arguments: bytes.
        outputs: bytes, a table of their addresses included.
        aliased: bytes of outputs that take the place of donated arguments.
        temporary: most bytes alive at once besides.
    """

    arguments: int
    outputs: int
    aliased: int
    temporary: int


def compile_memory(
    exported: jax.export.Exported, donated: Sequence[int], mesh: Mapping[str, int]
) -> Compiled:
    """What a program takes on each device.

    Args:
        exported: a program of plain arrays, for the CPU.
        donated: indices of the arguments that it may write over.
        mesh: sizes of the axes of its shardings' mesh; empty is one device.

    Raises:
        RuntimeError: the compiler refuses the program.

    Warns:
        UserWarning: the wider twin does not compile, so that 16 bits count as 32.
    """
    text = exported.mlir_module()
    if not re.search(r"tensor<(\d+x)*(bf16|f16|f8\w+)>", text):
        return Compiled(*_compile(exported, donated, mesh))
    try:
        doubled = _compile(_twin(exported, text), donated, mesh)
    except (RuntimeError, ValueError) as error:  # an operation tied to one width
        warnings.warn(
            f"16-bit arrays are counted as the CPU holds them, at up to twice their "
            f"width: the program with wider numbers does not compile ({error}).",
            stacklevel=2,
        )
        return Compiled(*_compile(exported, donated, mesh))
    return Compiled(*[count // 2 for count in doubled])


def _compile(
    exported: jax.export.Exported, donated: Sequence[int], mesh: Mapping[str, int]
) -> list[int]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "XLA_"))
    } | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "JAX_TRACEBACK_FILTERING": "off",
        # of the machine code alone: what is fused and where it lies stays
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={exported.nr_devices}",
    }
    done = subprocess.run(
        [sys.executable, "-P", __file__],  # -P: files beside it hide no packages
        input=pickle.dumps(
            (dataclasses.replace(exported, _get_vjp=None), tuple(donated), dict(mesh))
        ),
        capture_output=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"the step does not compile: {said[-1] if said else done}")
    return json.loads(done.stdout.splitlines()[-1])


def _twin(exported: jax.export.Exported, text: str) -> jax.export.Exported:
    """The same program with every number twice as wide."""
    text = re.sub(r", algorithm = <[^>]*>", "", text)
    text = _CONSTANT.sub(_wider_constant, text)
    text = _COMPLEX.sub(r"tensor<\1complex<f64>>", text)
    text = _TYPE.sub(lambda m: f"tensor<{m[1]}{_wider(m[2])}>", text)
    # the index of a branch is of 32 bits
    branches = itertools.count()

    def narrow(found: re.Match[str]) -> str:
        name = f"%narrow{next(branches)}"
        return (
            f"{name} = stablehlo.convert {found[2]} : (tensor<i64>) -> tensor<i32>\n"
            f'{found[1]}"stablehlo.case"({name})'
        )

    text = re.sub(r'^(.*)"stablehlo.case"\((%[\w#]+)\)', narrow, text, flags=re.M)
    text = text.replace("}) : (tensor<i64>) ->", "}) : (tensor<i32>) ->")
    version = re.search(rb"StableHLO_v([\d.]+)", exported.mlir_module_serialized)
    assert version is not None
    with jax.enable_x64(True):
        return dataclasses.replace(
            exported,
            in_avals=tuple(map(_wider_aval, exported.in_avals)),
            out_avals=tuple(map(_wider_aval, exported.out_avals)),
            mlir_module_serialized=mlir.serialize_portable_artifact(
                text.encode(), version[1].decode()
            ),
        )


def _wider(name: str) -> str:
    return _WIDER.get(name, "f16" if name.startswith("f8") else name)


def _wider_aval(aval: Any) -> Any:
    kind, width = aval.dtype.name.rstrip("0123456789"), aval.dtype.itemsize
    if aval.dtype == bool or width == 8:
        return aval
    if kind not in ("int", "uint", "complex"):
        kind = "float"
    return aval.update(dtype=np.dtype(f"{kind}{16 * width}"))


def _wider_constant(match: re.Match[str]) -> str:
    value, shape, name = match.groups()
    if name in _NUMPY and name in _WIDER:

        def widen(found: re.Match[str]) -> str:
            raw = bytes.fromhex(found[1])
            raw = raw if value.startswith('"') else raw[::-1]  # a number, or memory
            wide = np.frombuffer(raw, _NUMPY[name]).astype(_NUMPY[_WIDER[name]])
            raw = wide.tobytes() if value.startswith('"') else wide.tobytes()[::-1]
            return f"0x{raw.hex().upper()}"

        value = re.sub(r"0x([0-9A-Fa-f]+)", widen, value)
    return f"dense<{value}> : tensor<{shape}{name}>"


def _main() -> None:
    exported, donated, sizes = pickle.load(sys.stdin.buffer)
    grid = np.asarray(jax.devices()[: exported.nr_devices])
    grid = grid.reshape(tuple(sizes.values()) or 1)
    mesh = jax.sharding.Mesh(grid, tuple(sizes) or ("device",))
    jitted = jax.jit(
        exported.call,
        in_shardings=exported.in_shardings_jax(mesh),
        out_shardings=exported.out_shardings_jax(mesh),
        donate_argnums=donated,
        keep_unused=True,
    )
    lowered = jitted.lower(*exported.in_avals)
    try:  # library kernels of the CPU hold whole broadcasts
        compiled = lowered.compile({"xla_cpu_experimental_ynn_fusion_type": ""})
    except Exception:  # a compiler that has not heard of them
        compiled = lowered.compile()
    found: Any = compiled.memory_analysis()
    sizes = [
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,  # peak_memory_in_bytes leaves these out on a CPU
    ]
    print(json.dumps(sizes))


if __name__ == "__main__":
    _main()
