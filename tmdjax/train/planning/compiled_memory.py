"""Bytes of a program, by the CPU's compiler on simulated devices.

Run as a script this file is the other side: it reads an exported program from standard
input, compiles it for as many devices of a CPU as the program names, and prints what
the compiler's ``memory_analysis`` says.

A CPU makes float32 of bfloat16 but not of float16. So that 16-bit arrays have their
width, bfloat16 is compiled as float16: values differ, bytes do not. 8-bit floats are
counted as the CPU holds them.
"""

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.extend import mlir


def compile_memory(
    exported: jax.export.Exported, donated: Sequence[int], mesh: Mapping[str, int]
) -> dict[str, int]:
    """What a program takes on each device.

    Args:
        exported: a program, for the CPU.
        donated: indices of the arguments that it may write over.
        mesh: sizes of the axes of its shardings' mesh; empty is one device.

    Returns:
        Bytes: 'arguments', 'outputs', 'aliased' (outputs in the place of donated
        arguments) and 'temporary' (most alive at once besides).

    Raises:
        RuntimeError: the compiler refuses the program.
    """
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
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={exported.nr_devices} "
        "--xla_disable_hlo_passes=change-op-data-type",  # float16 stays as it is
    }
    program = dataclasses.replace(_in_float16(exported), _get_vjp=None)
    done = subprocess.run(
        [sys.executable, "-P", __file__],  # -P: files beside it hide no packages
        input=pickle.dumps((program, tuple(donated), dict(mesh))),
        capture_output=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"the step does not compile: {said[-1] if said else done}")
    return json.loads(done.stdout.splitlines()[-1])


def _in_float16(exported: jax.export.Exported) -> jax.export.Exported:
    """The same program with float16 in the place of bfloat16."""
    text = exported.mlir_module()
    if "bf16" not in text:
        return exported
    text = re.sub(r", algorithm = <[^>]*>", "", text)  # may name bfloat16
    infinity = r"dense<0x([7F])F80> : tensor<([\dx]*)bf16>"
    text = re.sub(infinity, r"dense<0x\1C00> : tensor<\2f16>", text)
    version = re.search(rb"StableHLO_v([\d.]+)", exported.mlir_module_serialized)
    assert version is not None

    def narrow(aval: Any) -> Any:
        return aval.update(dtype=np.float16) if aval.dtype == jnp.bfloat16 else aval

    return dataclasses.replace(
        exported,
        in_avals=tuple(map(narrow, exported.in_avals)),
        out_avals=tuple(map(narrow, exported.out_avals)),
        mlir_module_serialized=mlir.serialize_portable_artifact(
            text.replace("bf16", "f16").encode(), version[1].decode()
        ),
    )


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
    # of several outputs there is a table of addresses
    table = 8 * len(exported.out_avals) if len(exported.out_avals) > 1 else 0
    sizes = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes - table,
        "aliased": found.alias_size_in_bytes,
        "temporary": found.temp_size_in_bytes,  # a CPU's peak_memory leaves these out
    }
    print(json.dumps(sizes))


if __name__ == "__main__":
    _main()
