"""Videos of your own, as uint8 tensors in a folder; floats are made a batch at a time.

A folder holds ``video.npy``: uint8 [n, frame, height, width, channel], read through a
memory map; beside it, each optional, ``text.npy`` (floats [n, word, width], what the
text encoder made of the prompts), ``label.npy`` (integers [n]) and ``prompts.json`` (a
list of n texts).
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tmdjax.core.checks import check_batch, check_finite, check_range
from tmdjax.core.files import array_of, json_of
from tmdjax.core.trees import content_hash
from tmdjax.data.dataset import Dataset, count_up_to
from tmdjax.data.pipeline import Batch, Batches, BatchPlan


def to_float(video: Any) -> Any:
    """Bytes 0..255 as float32 in [-1, 1]. Jittable; numpy in, numpy out."""
    return video.astype(np.float32) / np.float32(127.5) - 1


def to_uint8(video: Any) -> np.ndarray:
    """Floats in [-1, 1], clipped, as the nearest bytes: inverse of :func:`to_float`."""
    levels = (np.clip(np.asarray(video, np.float32), -1, 1) + 1) * 127.5
    return np.rint(levels).astype(np.uint8)


def open_videos(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], list[str] | None]:
    """Opens a folder that holds ``video.npy`` and what the module says beside it.

    Args:
        folder: that holds the files.

    Returns:
        Arrays 'video' uint8 [n, frame, height, width, channel] (a memory map),
        'text' float32 [n, word, width] if there is one, and 'label' int32 [n]: as
        given, else the number of the prompt among the sorted distinct prompts, else 0.
        And the prompts, or None.

    Raises:
        FileNotFoundError: no such folder, or no videos in it.
        ValueError: a damaged file, other axes, dtypes or lengths.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; check folder=.")
    paths = {name: folder / f"{name}.npy" for name in ("video", "text", "label")}
    if not paths["video"].is_file():
        raise FileNotFoundError(f"{folder} holds no video.npy; write it with np.save.")
    # a link that leads nowhere is no missing label: reading it fails
    arrays = {name: _open(p) for name, p in paths.items() if os.path.lexists(p)}
    video = arrays["video"]
    if video.ndim != 5 or video.shape[-1] not in (1, 3) or 0 in video.shape:
        raise ValueError(
            f"the videos of {folder} have shape {video.shape}; they need [n, frame, "
            f"height, width, channel] with 1 or 3 channels."
        )
    if video.dtype != np.uint8:
        raise ValueError(
            f"the videos of {folder} are of dtype {video.dtype}; they need uint8 "
            f"(data.videos.files.to_uint8 converts floats in [-1, 1])."
        )
    prompts = _prompts(folder, len(video))
    return _conditions(folder, arrays, prompts), prompts


def files_of(
    *, folder: str | os.PathLike[str] | None = None, **options: Any
) -> tuple[Path, ...]:
    """The files that :func:`load_video_files` reads with these options."""
    names = ("video.npy", "text.npy", "label.npy", "prompts.json")
    return () if folder is None else tuple(Path(folder, name) for name in names)


def _open(path: Path) -> np.ndarray:
    try:
        return array_of(path)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or no array of numbers ({error}). Write it again with "
            f"np.save."
        ) from error


def _prompts(folder: Path, count: int) -> list[str] | None:
    path = folder / "prompts.json"
    if not os.path.lexists(path):
        return None
    try:
        prompts = json_of(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}).") from error
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"{path} must hold a list of texts, one a video.")
    if len(prompts) != count:
        raise ValueError(f"{path} has {len(prompts)} texts for {count} videos.")
    return prompts


def _conditions(
    folder: Path, arrays: Mapping[str, np.ndarray], prompts: list[str] | None
) -> dict[str, np.ndarray]:
    """Video, text and label, checked."""
    video = arrays["video"]
    checked = {"video": video}
    if "text" in arrays:
        text = arrays["text"]
        check_batch(f"text of {folder}", text, len(video))
        if (
            text.ndim != 3
            or 0 in text.shape
            or not np.issubdtype(text.dtype, np.floating)
        ):
            raise ValueError(
                f"the text of {folder} has shape {text.shape} and dtype {text.dtype}; "
                f"it needs floats [n, word, width]."
            )
        checked["text"] = text.astype(np.float32)
        check_finite(checked["text"], f"text of {folder}", "Encode the prompts again.")
    if "label" in arrays:
        label = np.asarray(arrays["label"])
        check_batch(f"label of {folder}", label, len(video))
        if label.ndim != 1 or not np.issubdtype(label.dtype, np.integer):
            raise ValueError(
                f"the labels of {folder} have shape {label.shape} and dtype "
                f"{label.dtype}; they need integers [n]."
            )
        for which, value in (("least", label.min()), ("greatest", label.max())):
            check_range(f"{which} label of {folder}", int(value), 0, 2**31 - 1)
    elif prompts is not None:
        label = np.unique(prompts, return_inverse=True)[1]
    else:
        label = np.zeros(len(video), np.int32)
    checked["label"] = label.astype(np.int32)
    return checked


def video_batches(
    arrays: Mapping[str, np.ndarray],
    batch_size: int,
    seed: int = 0,
    *,
    threads: int = 1,
    **options: Any,
) -> Batches:
    """Endless batches of videos; only those of a batch are read and made floats.

    The fingerprint of a state covers the shape of the videos, the first and the last
    of them, and the other arrays whole.

    Args:
        arrays: a split of :func:`load_video_files`, or what :func:`open_videos` gave.
        batch_size: videos of a batch.
        seed: of the shuffle.
        threads: that read ahead, two batches each; 0 reads when asked.
        **options: shuffle, drop_remainder, shard_index and shard_count of
            ``data.BatchPlan``.

    Returns:
        Iterator over 'video' [batch, frame, height, width, channel], float32 in
        [-1, 1], and the other arrays' rows.

    Raises:
        ValueError: arrays of different length, videos that are not uint8, or a bad
            plan.
    """
    video = arrays["video"]
    if video.dtype != np.uint8:
        raise ValueError(
            f"the videos are of dtype {video.dtype}; give uint8, or use data.in_memory "
            f"for floats."
        )
    for name, array in arrays.items():
        check_batch(f"arrays[{name!r}]", array, len(video))
    plan = BatchPlan(count=len(video), batch_size=batch_size, seed=seed, **options)

    def gather(indices: np.ndarray) -> Batch:
        rows = {name: np.asarray(array[indices]) for name, array in arrays.items()}
        return {**rows, "video": to_float(rows["video"])}

    def fingerprint() -> str:
        digest = hashlib.sha256(repr(video.shape).encode())
        digest.update(video[[0, -1]].tobytes())
        rest = {name: array for name, array in arrays.items() if name != "video"}
        digest.update(content_hash(rest).encode())
        return digest.hexdigest()

    return Batches(plan, gather, fingerprint, threads=threads)


def load_video_files(
    files: Mapping[str, Path],
    *,
    folder: str | os.PathLike[str] | None = None,
    train_count: int | None = None,
    test_count: int = 1,
) -> Dataset:
    """Opens a folder with ``video.npy`` (the module names the rest) as a data set.

    The last videos are held out: write them in random order. The videos stay uint8,
    and on disk where they are memory-mapped: :func:`video_batches` makes floats of a
    batch, :func:`to_float` of anything.

    Args:
        files: none.
        folder: that holds the files.
        train_count: the first so many; None for all that are not held out.
        test_count: the last so many.

    Returns:
        'video' uint8 [n, frame, height, width, channel], 'label' int32 [n], and 'text'
        float32 [n, word, width] if the folder has one. ``meta`` has 'folder', and
        'train_prompts' and 'test_prompts' where there are texts ('class_names' too,
        where each label has one text).

    Raises:
        FileNotFoundError: no such folder, or no videos in it.
        ValueError: no folder given; counts that do not fit; or as
            :func:`open_videos`.
    """
    if folder is None:
        raise ValueError(
            "data source 'video_files' needs folder=, the folder with video.npy."
        )
    arrays, prompts = open_videos(folder)
    count = len(arrays["video"])
    rest = count - count_up_to("test_count", test_count, count - 1)
    train_count = count_up_to("train_count", train_count, rest)
    meta: dict[str, Any] = {"folder": str(folder)}
    if prompts is not None:
        meta["train_prompts"] = tuple(prompts[:train_count])
        meta["test_prompts"] = tuple(prompts[rest:])
        # One text a label and one label a text: the texts name the classes.
        pairs = {*zip(arrays["label"].tolist(), prompts)}
        if [i for i, _ in sorted(pairs)] == [*range(len({*prompts}))]:
            meta["class_names"] = tuple(text for _, text in sorted(pairs))
    return Dataset(
        name="video_files",
        train={name: array[:train_count] for name, array in arrays.items()},
        test={name: array[rest:] for name, array in arrays.items()},
        num_classes=int(arrays["label"].max()) + 1,
        meta=meta,
    )
