"""Endless batches that resume exactly, from memory or from ArrayRecord files.

Which samples make batch number ``step`` is a pure function of the plan, so the
state of an iterator is one integer. Grain runs the steps (with read-ahead for
files); the batch is gathered at once, never sample by sample.
"""

import dataclasses
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from flax import serialization

from tmdjax.core.checks import check_batch, check_count, check_range
from tmdjax.core.files import in_native_order
from tmdjax.core.trees import content_hash

Example = Mapping[str, Any]
Batch = dict[str, np.ndarray]

# Grain's ranges need an end; no run reaches this step.
_LAST_STEP = 2**48
_EDGE_BYTES = 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Which samples make which batch.

    Each epoch has its own permutation of all samples. Shard i of k takes every
    k-th of it from i on; shards are equally long and disjoint within an epoch,
    so up to k - 1 samples sit out (other ones each epoch, if they are shuffled).

    Attributes:
        count: number of samples, >= 1.
        batch_size: samples that one shard contributes to a batch.
        seed: of the permutations, in [0, 2**64).
        shuffle: False keeps the given order in every epoch.
        drop_remainder: True leaves out an epoch's last, incomplete batch; False
            yields it short.
        shard_index: of this process, in [0, shard_count).
        shard_count: number of processes that share the data.

    Raises:
        TypeError: a number that is not an integer.
        ValueError: no samples, a number out of range, or a batch larger than the
            shard while ``drop_remainder`` is set.
    """

    count: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    drop_remainder: bool = True
    shard_index: int = 0
    shard_count: int = 1

    def __post_init__(self) -> None:
        for name in ("count", "batch_size", "seed", "shard_index", "shard_count"):
            # The plan is part of a JSON-able state: no NumPy integers.
            object.__setattr__(self, name, check_count(name, getattr(self, name), 0))
        if self.count < 1:
            raise ValueError("the data are empty; give at least one sample.")
        check_range("batch_size", self.batch_size, 1)
        check_range("seed", self.seed, 0, 2**64, open_high=True)
        check_range("shard_count", self.shard_count, 1, self.count)
        check_range("shard_index", self.shard_index, 0, self.shard_count - 1)
        if self.drop_remainder and self.batch_size > self.shard_size:
            raise ValueError(
                f"batch_size={self.batch_size} is larger than the {self.shard_size} "
                f"sample(s) of a shard ({self.count} over {self.shard_count}), so "
                f"every batch would be dropped. Use a smaller batch or "
                f"drop_remainder=False."
            )

    @property
    def shard_size(self) -> int:
        """Samples a shard sees in an epoch."""
        return self.count // self.shard_count

    @property
    def steps_per_epoch(self) -> int:
        """Batches a shard yields in an epoch."""
        whole, rest = divmod(self.shard_size, self.batch_size)
        return whole + bool(rest and not self.drop_remainder)

    def indices(self, step: int) -> np.ndarray:
        """Positions of the samples of batch ``step`` (from 0), int64 [batch]."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = _order(self.count, self.seed, epoch if self.shuffle else None)
        shard = order[self.shard_index :: self.shard_count][: self.shard_size]
        return shard[batch * self.batch_size : (batch + 1) * self.batch_size]


@functools.lru_cache(maxsize=8)
def _order(count: int, seed: int, epoch: int | None) -> np.ndarray:
    """Permutation of one epoch; the identity for None.

    Sorts the raw bits of a counter generator: NumPy keeps that stream fixed, but
    not the algorithm of ``Generator.permutation``.
    """
    if epoch is None:
        order = np.arange(count)
    else:
        bits = np.random.Philox(key=np.array([seed, epoch], np.uint64))
        order = np.argsort(bits.random_raw(count), kind="stable")
    order.flags.writeable = False
    return order


class Batches(Iterator[Batch]):
    """Endless iterator over batches; the state is the number of those taken.

    Args:
        plan: which samples make which batch.
        gather: ``indices [batch] -> {name: [batch, ...]}``.
        data_hash: returns a name of the data's content; called for a state only.
        threads: that read ahead; 0 gathers in the calling thread.
    """

    def __init__(
        self,
        plan: BatchPlan,
        gather: Callable[[np.ndarray], Batch],
        data_hash: Callable[[], str],
        *,
        threads: int = 0,
    ):
        check_range("threads", threads, 0)
        self.plan = plan
        self._gather = gather
        self._data_hash = functools.cache(data_hash)
        self._threads = threads
        self._iterator: grain.DatasetIterator[Batch] | None = None
        self._step = 0

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start(self._step)
        try:
            batch = next(self._iterator)
        except BaseException:
            self.close()  # read-ahead is past this batch: a retry must restart at it
            raise
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """JSON-able position: batches taken, and what they were taken from."""
        return {"step": self._step, "fingerprint": self._fingerprint()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the batch that ``state`` was taken behind.

        Raises:
            ValueError: not a state of this class, or one of other data or
                settings; the message lists the differences.
        """
        if set(state) != {"step", "fingerprint"}:
            raise ValueError(
                f"a pipeline state has the keys 'step' and 'fingerprint', got "
                f"{sorted(state)}; give what get_state() returned."
            )
        was, now = state["fingerprint"], self._fingerprint()
        changed = [
            f"{key} was {was.get(key)!r}, is {now.get(key)!r}"
            for key in sorted({*was, *now})
            if was.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                f"this state belongs to another pipeline: {'; '.join(changed)}. "
                f"Rebuild the pipeline as it was, or start afresh."
            )
        check_range("step", state["step"], 0, _LAST_STEP)
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Stops the read-ahead threads; the next batch starts new ones."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _fingerprint(self) -> dict[str, Any]:
        return {"data": self._data_hash(), **dataclasses.asdict(self.plan)}

    def _start(self, step: int) -> grain.DatasetIterator[Batch]:
        steps = grain.MapDataset.range(step, _LAST_STEP)
        batches = steps.map(self.plan.indices).map(self._gather)
        options = grain.ReadOptions(
            num_threads=self._threads, prefetch_buffer_size=2 * self._threads
        )
        return iter(batches.to_iter_dataset(options))


def in_memory(
    arrays: Mapping[str, Any], batch_size: int, seed: int = 0, **options: Any
) -> Batches:
    """Endless batches of arrays in host memory.

    Args:
        arrays: {name: [n, ...]}, not copied; leave them unchanged.
        batch_size: samples of a batch.
        seed: of the shuffle.
        **options: shuffle, drop_remainder, shard_index and shard_count of
            :class:`BatchPlan`.

    Returns:
        Iterator over {name: [batch, ...]} in the arrays' dtypes, and in the byte order
        of this machine, which jax takes alone.

    Raises:
        ValueError: empty data, arrays of different length, or a bad plan.
    """
    data = {name: np.asarray(array) for name, array in arrays.items()}
    if not data:
        raise ValueError("the data are empty; give at least one named array.")
    first = next(iter(data.values()))
    count = len(first) if first.ndim else 0
    for name, array in data.items():
        check_batch(f"arrays[{name!r}]", array, count)
    plan = BatchPlan(count=count, batch_size=batch_size, seed=seed, **options)

    def gather(indices: np.ndarray) -> Batch:
        return {name: in_native_order(array[indices]) for name, array in data.items()}

    return Batches(plan, gather, lambda: content_hash(data))


def encode_example(example: Example) -> bytes:
    """A dict of numeric arrays as msgpack bytes, in the byte order of this machine."""
    return serialization.msgpack_serialize(
        {name: in_native_order(value) for name, value in example.items()}
    )


def decode_example(record: bytes) -> Batch:
    """Inverse of :func:`encode_example`; shapes and dtypes come back as they were.

    The dtypes are those of this machine's byte order ('>f4' comes back as float32).
    """
    example: Any = serialization.msgpack_restore(record)
    return example


def write_array_record(
    path: str | os.PathLike[str], examples: Iterable[Example]
) -> int:
    """Writes examples to one ArrayRecord file, complete or not at all.

    Args:
        path: of the file, in a folder that is there; an older one is replaced once the
            new one is whole. Of several writers at once the last one's file stays.
        examples: dicts of numeric arrays, all with the same names, shapes and
            dtypes.

    Returns:
        The number of examples written.

    Raises:
        ValueError: no example, or one that differs from the first.
        TypeError: a value that is not numeric.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path = Path(path)
    first, count = None, 0
    # a folder of its own: another writer of the same file may be at work beside it
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as place:
        partial = Path(place, path.name)
        # Records of their own groups are what makes random access cheap.
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        try:
            for count, example in enumerate(examples, 1):
                layout = _layout(example, count - 1)
                first = first or layout
                if layout != first:
                    raise ValueError(
                        f"example {count - 1} is {layout} but example 0 is {first}; "
                        f"all need the same names, shapes and dtypes."
                    )
                writer.write(encode_example(example))
            if not count:
                raise ValueError(f"no examples to write to {path}; give at least one.")
        finally:
            writer.close()
        with partial.open("rb") as file:  # the data reach the disk before the name does
            os.fsync(file.fileno())
        partial.replace(path)
    return count


def _layout(example: Example, index: int) -> dict[str, str]:
    layout = {}
    for name, value in sorted(example.items()):
        array = in_native_order(value)
        if array.dtype.kind in "OSUMm" or array.dtype.fields:
            raise TypeError(
                f"example {index}[{name!r}] has dtype {array.dtype}; records hold "
                f"numbers. Encode text as uint8 or token ids."
            )
        layout[name] = f"{array.dtype}{list(array.shape)}"
    return layout


def array_record(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    batch_size: int,
    seed: int = 0,
    *,
    decode: Callable[[bytes], Mapping[str, Any]] = decode_example,
    threads: int = 2,
    **options: Any,
) -> Batches:
    """Endless batches of the records of ArrayRecord files, read ahead by threads.

    The fingerprint of a state covers each file's size, record count, and first and
    last 64 KiB, not its name: files may move, and large ones are not read whole. Keep
    ``decode`` the same yourself: a function has no fingerprint.

    Args:
        paths: one file or several, in order; written with ``group_size:1``.
        batch_size: samples of a batch.
        seed: of the shuffle over all records of all files.
        decode: one record's bytes to arrays that stack with those of the others.
        threads: that read ahead, two batches each; 0 reads when asked.
        **options: shuffle, drop_remainder, shard_index and shard_count of
            :class:`BatchPlan`.

    Returns:
        Iterator over {name: [batch, ...]}.

    Raises:
        FileNotFoundError: a file is missing (named).
        ValueError: no file, no records, one that is truncated or no ArrayRecord
            (named), or a bad plan.
    """
    names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files = [os.fspath(name) for name in names]
    if not files:
        raise ValueError("paths is empty; give at least one ArrayRecord file.")
    counts = [_count_records(file) for file in files]
    source: Any = grain.sources.ArrayRecordDataSource(files)
    count = sum(counts)
    plan = BatchPlan(count=count, batch_size=batch_size, seed=seed, **options)

    def gather(indices: np.ndarray) -> Batch:
        try:
            records = source.__getitems__(indices.tolist())
        except RuntimeError as error:
            raise ValueError(
                f"cannot read records of {', '.join(files)}: {error}. The file is "
                f"damaged: write it again."
            ) from error
        examples = [decode(record) for record in records]
        return {k: np.stack([e[k] for e in examples]) for k in examples[0]}

    return Batches(
        plan, gather, lambda: _edge_hash(zip(files, counts)), threads=threads
    )


def _count_records(file: str) -> int:
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"record file {file} does not exist. Check the path, or write it with "
            f"write_array_record."
        )
    try:
        source: Any = grain.sources.ArrayRecordDataSource([file])
        return len(source)
    except RuntimeError as error:
        raise ValueError(
            f"record file {file} is truncated or not an ArrayRecord file "
            f"({str(error) or 'no footer'}). Write or copy it again."
        ) from error


def _edge_hash(files: Iterable[tuple[str, int]]) -> str:
    digest = hashlib.sha256()
    for path, count in files:
        size = os.path.getsize(path)
        digest.update(f"{size}|{count}|".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(0, size - _EDGE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()
