"""Products of block-scaled 8-bit matrices on Hopper GPUs: Pallas, Mosaic GPU, wgmma.

No GPU has run this kernel. Tests prove without one that its tiles, scales and pipeline
give the product (in Pallas's interpreter), and that Mosaic lowers it for CUDA;
``python -m benchmarks.fp8`` tries and times it on a GPU.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tmdjax.core.checks import check_choice
from tmdjax.core.types import Array
from tmdjax.quant.fp8 import Quantised
from tmdjax.quant.self_test import is_hopper

TILE = 128
"""Rows and columns of the product that a thread block sums, and terms of a sum that are
added before they are scaled: the groups of 'block' scaling."""

_HALF = TILE // 2  # rows of one warpgroup; two of them multiply, a third one copies
_STAGES = 4  # pairs of tiles under way: 33 kB each, of 227 kB of shared memory
_BAND = 8  # columns of tiles that are walked together, so that L2 keeps the operands
_COPIES = 32  # of a scale that a block shares: Mosaic copies 128 bytes or more
_MULTIPROCESSORS = 132  # an H100's, where a program is lowered without a GPU


def block_product(
    a: Quantised, b: Quantised, dtype: Any = jnp.float32, *, interpret: bool = False
) -> Array:
    """The product of two block-scaled 8-bit matrices on a Hopper GPU.

    A sum of 8-bit products keeps about 14 bits in a Hopper tensor core, so it adds 128
    terms and no more. Their sum is multiplied by the scales of its row and of its
    column or block, and added to a total, both in float32; the total is rounded
    to ``dtype`` once.

    The tensor core's instruction, ``wgmma``, reads 8-bit operands only with the summed
    axis contiguous, and b [k, n] is transposed before as 8-bit values, which
    rounds nothing. Of y = x w that is a pass over w; of dx = dy wᵀ there is none, for
    w as it is stored is the transpose of b; of dw = xᵀ dy it is one over x and one over
    dy. Sizes that are no multiples of 128 are padded with zeros.

    XLA does not partition the product: a program of several devices gathers a and b.

    Args:
        a: [m, k] by groups of '1x128', of float8_e4m3fn or float8_e5m2.
        b: [k, n] by groups of '128x128' or '128x1', of the dtype of a.
        dtype: of the product: float32, bfloat16 or float16.
        interpret: compute it by Pallas's interpreter on a CPU, in seconds for a few
            tiles. The sums of 128 terms are then float32's and not those of ``wgmma``,
            of which the interpreter has none with a transposed operand.

    Returns:
        [m, n], of ``dtype``.

    Raises:
        ValueError: other granularities, dtypes or shapes.

    References:
        DeepSeek-V3 (arXiv 2412.19437), section 3.3.2.
    """
    dtype = jnp.dtype(dtype)
    check_choice("a.granularity", a.granularity, ("1x128",))
    check_choice("b.granularity", b.granularity, ("128x128", "128x1"))
    check_choice("dtype", dtype.name, ("float32", "bfloat16", "float16"))
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"a has shape {a.shape} and b has shape {b.shape}; give [m, k] and [k, n]."
        )
    if a.values.dtype != b.values.dtype:
        raise ValueError(
            f"a is of {a.values.dtype} and b of {b.values.dtype}; the kernel takes "
            f"operands of one dtype. Quantise both to float8_e4m3fn."
        )
    (m, k), n = a.shape, b.shape[1]
    left, right = (_padded(q, TILE, TILE) for q in (a.values, b.values.mT))
    steps = -(-k // TILE)
    of_rows = _padded(a.scale.mT, 1, TILE).reshape(steps, -1, _HALF)
    if b.granularity == "128x1":
        of_columns = _padded(b.scale, 1, TILE).reshape(steps, -1, TILE)
    else:
        of_columns = jnp.broadcast_to(b.scale[..., None], (*b.scale.shape, _COPIES))
    kernel = _kernel((left.shape[0], right.shape[0]), dtype, interpret)
    return kernel(left, right, of_rows, of_columns)[:m, :n]


def _padded(x: Array, rows: int, columns: int) -> Array:
    """With zeros at the end of either axis, up to multiples of two numbers."""
    missing = [(0, -size % unit) for size, unit in zip(x.shape, (rows, columns))]
    return jnp.pad(x, missing) if any(after for _, after in missing) else x


def _kernel(
    shape: tuple[int, int], dtype: Any, interpret: bool
) -> Callable[..., Array]:
    """The kernel of a product [m, n], both multiples of 128.

    It takes a [m, k], b transposed [n, k], the scales of rows [k / 128, m / 64, 64] and
    of columns [k / 128, n / 128, 128]; of blocks [k / 128, n / 128, copies].
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tiles = shape[0] // TILE, shape[1] // TILE
    sums = plgpu.Layout.WGMMA  # how a warpgroup's registers hold [64, 128] sums

    def in_registers(ref: Any, layout: Any) -> Array:
        return ref[...] if interpret else plgpu.load(ref, (), layout=layout)

    def rows_of_128_bytes(dtype: Any) -> tuple[Any, ...]:
        """The order of a tile in shared memory that TMA writes and wgmma reads."""
        across = 128 // jnp.dtype(dtype).itemsize
        return plgpu.TilingTransform((8, across)), plgpu.SwizzleTransform(128)

    def body(a_all: Any, b_all: Any, rows_all: Any, columns_all: Any, y_all: Any):
        warpgroup = lax.axis_index("warpgroup")
        own = pl.ds(warpgroup * _HALF, _HALF)  # rows of a tile

        def add(
            _: Any, a: Any, b: Any, of_rows: Any, of_columns: Any, total: Array
        ) -> Any:
            """Adds 128 terms to the total [64, 128] of this warpgroup's rows."""

            def scale() -> Array:
                rows = in_registers(of_rows.at[0, warpgroup], sums.reduce(1))
                if of_columns.shape[-1] != TILE:
                    of_block = of_columns[0, 0, 0]
                    return lax.broadcast_in_dim(rows * of_block, total.shape, [0])
                columns = in_registers(of_columns.at[0, 0], sums.reduce(0))
                across = lax.broadcast_in_dim(columns, total.shape, [1])
                return lax.broadcast_in_dim(rows, total.shape, [0]) * across

            def by_tensor_core(terms: Any) -> Array:
                plgpu.wgmma(terms, a.at[own], plgpu.transpose_ref(b, (1, 0)))
                by = scale()  # read while the product is computed
                return total + terms[...] * by  # waits for it

            if interpret:
                x, w = (tile[...].astype(jnp.float32) for tile in (a.at[own], b))
                return total + lax.dot_general(x, w, (((1,), (1,)), ((), ()))) * scale()
            terms = plgpu.WGMMAAccumulatorRef((_HALF, TILE), jnp.float32)
            return pl.run_scoped(by_tensor_core, terms)

        def pipeline(compute: Any) -> Any:
            """Steps along k: a third warpgroup copies ahead of the two that add."""
            order = rows_of_128_bytes(a_all.dtype)
            tile = plgpu.BlockSpec((TILE, TILE), lambda k: (0, k), transforms=order)
            of_rows, of_columns = (
                plgpu.BlockSpec((1, count, ref.shape[-1]), lambda k: (k, 0, 0))
                for count, ref in ((2, rows_all), (1, columns_all))
            )
            return plgpu.emit_pipeline_warp_specialized(
                add,
                grid=(a_all.shape[1] // TILE,),
                in_specs=[tile, tile, of_rows, of_columns],
                wg_axis="warpgroup",
                num_compute_wgs=2,
                memory_registers=40,
                max_concurrent_steps=_STAGES,
                compute_context=compute,
            )

        def walk(allocations: Any, y_tile: Any) -> None:
            """Every tile of the product that falls to this thread block."""

            @plgpu.nd_loop((tiles[0] * tiles[1],), collective_axes="block")
            def _(loop: Any) -> None:
                i, j = plgpu.planar_snake(loop.index[0], tiles, 1, _BAND)
                down, across = pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)

                def compute(run: Any) -> None:
                    total = jnp.full((_HALF, TILE), 0, jnp.float32)
                    total = run(total if interpret else plgpu.layout_cast(total, sums))
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile
                    y_tile[warpgroup] = total.astype(dtype)
                    plgpu.commit_smem()
                    target = y_all.at[down, across].at[own]
                    plgpu.copy_smem_to_gmem(y_tile.at[warpgroup], target)

                pipeline(compute)(
                    a_all.at[down],
                    b_all.at[across],
                    rows_all.at[:, pl.ds(2 * i, 2)],
                    columns_all.at[:, pl.ds(j, 1)],
                    allocations=allocations,
                )

            plgpu.wait_smem_to_gmem(0)

        allocate = pipeline(lambda run: None).get_allocations
        pl.run_scoped(
            walk,
            allocations=allocate(a_all, b_all, rows_all, columns_all),
            y_tile=plgpu.SMEM(
                (2, _HALF, TILE), dtype, transforms=rows_of_128_bytes(dtype)
            ),
            collective_axes="warpgroup",
        )

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(min(tiles[0] * tiles[1], _multiprocessors()),),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        interpret=_interpreter() if interpret else None,
    )


def _multiprocessors() -> int:
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else _MULTIPROCESSORS


def _interpreter() -> Any:
    # jax 0.10 has no public name for it.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def may_run() -> bool:
    """Whether every GPU at hand has the kernel's instructions, or there is none.

    Without a GPU a program can still be lowered for one, which is then a Hopper.
    """
    return all(is_hopper(each) for each in jax.devices() if each.platform == "gpu")


def check_kernel(
    product: Callable[[Quantised, Quantised], Array] | None = None,
    sizes: tuple[int, int, int] = (200, 840, 330),
) -> None:
    """Multiplies known numbers on the device at hand, and compares every bit.

    Numbers are small integers times powers of two, all scales differ from their
    neighbours', and no sum rounds: what a product leaves out or reads from another
    place shows. :func:`tmdjax.quant.fp8_recipe` calls it before the first product of
    ``kernel='hopper'`` on a Hopper GPU.

    Args:
        product: what is tried; None is :func:`block_product`.
        sizes: m, k and n of [m, k] by [k, n]; k at most 4096.

    Raises:
        RuntimeError: a number of the product is another.
    """
    product = jax.jit(block_product) if product is None else product
    m, k, n = sizes
    random = np.random.default_rng(0)

    def drawn(rows: int, columns: int, granularity: str) -> tuple[Quantised, Any]:
        """As the kernel takes them, and the numbers they stand for."""
        values = random.choice([-3, -2, -1, 0, 1, 2, 4], (rows, columns))
        height, width = (int(size) for size in granularity.split("x"))
        groups = np.indices((-(-rows // height), -(-columns // width)))
        scale = 2.0 ** ((groups * [[[3]], [[1]]]).sum(0) % 5 - 2)
        each = scale[np.arange(rows)[:, None] // height, np.arange(columns) // width]
        narrow = values.astype(jnp.float8_e4m3fn), scale.astype(np.float32)
        return Quantised(*narrow, granularity), values * each

    a, x = drawn(m, k, "1x128")
    for granularity in ("128x128", "128x1"):
        b, w = drawn(k, n, granularity)
        y = np.asarray(product(a, b), np.float64)
        wrong = np.argwhere(y != x @ w)
        if len(wrong):
            raise RuntimeError(
                f"self-test of the block-scaled kernel on "
                f"{jax.devices()[0].device_kind!r}: {len(wrong)} of {m * n} numbers of "
                f"a product by {granularity!r} are wrong, the first at "
                f"{tuple(map(int, wrong[0]))}. Use kernel='xla'."
            )


def check_kernel_once() -> None:
    """:func:`check_kernel` where the device at hand is a Hopper GPU, in any trace."""
    if is_hopper(jax.devices()[0]):
        _check_kernel(jax.devices()[0].device_kind)


@functools.cache
def _check_kernel(kind: str) -> None:
    del kind  # once for each
    with jax.ensure_compile_time_eval():
        check_kernel()
