"""Where metrics go besides the files of a run: TensorBoard, Weights & Biases."""

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tmdjax.core.checks import check_choice
from tmdjax.core.files import write_atomically
from tmdjax.core.optional import import_optional

_TRACES = {"tensorboard": "events.out.tfevents*", "wandb": "wandb_id"}
"""What a writer leaves in the folder of its log."""

WRITERS = tuple(_TRACES)


@runtime_checkable
class Writer(Protocol):
    """Takes the rows of a log as they are written.

    Attributes:
        new: whether the folder had nothing of this writer before; it then lacks the
            rows that the log already has.
    """

    new: bool

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One row."""

    def rewind(self, step: int) -> None:
        """Rows beyond a step will be written again."""

    def close(self, failed: bool = False) -> None:
        """No more rows; failed says that an error ended them."""


def has_rows(name: str, folder: str | os.PathLike[str]) -> bool:
    """Whether the writer of a name (of ``WRITERS``) was given rows in a folder."""
    check_choice("writer", name, WRITERS)
    return any(Path(folder).glob(_TRACES[name]))


class TensorBoard:
    """Event files in a folder, through tensorboardX.

    Args:
        folder: of the event files.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = Path(folder)
        self.new = not has_rows("tensorboard", folder)
        self._events = self._open()

    def _open(self, **options: Any) -> Any:
        package = import_optional("tensorboardX", "--tensorboard", "logging")
        return package.SummaryWriter(logdir=str(self._folder), **options)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One row."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        """Hides the events beyond a step."""
        self._events.close()
        self._events = self._open(purge_step=step + 1)

    def close(self, failed: bool = False) -> None:
        """Closes the file."""
        self._events.close()


class WandB:
    """A run of Weights & Biases; one folder is one run, which goes on by itself.

    The project is $WANDB_PROJECT or 'tmdjax'; $WANDB_MODE=offline writes local files
    alone. Rows carry their own 'step', so those that a resumed run writes again do no
    harm: they are equal.

    Args:
        folder: of the run's files.
        name: shown for the run.
        settings: shown with it.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(
        self, folder: str | os.PathLike[str], name: str, settings: Mapping[str, Any]
    ):
        wandb = import_optional("wandb", "--wandb", "logging")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "wandb_id"
        self.new = not has_rows("wandb", folder)
        identity = known.read_text() if known.exists() else uuid.uuid4().hex[:12]
        write_atomically(known, identity.encode())
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tmdjax"),
            dir=str(folder),
            id=identity,
            name=name,
            config=dict(settings),
            resume="allow",
            reinit="create_new",
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One row."""
        self._run.log({"step": step, **values})

    def rewind(self, step: int) -> None:
        """Nothing to do: rows that are written again equal those they replace."""

    def close(self, failed: bool = False) -> None:
        """Ends the run."""
        self._run.finish(exit_code=int(failed))


def open_writers(
    names: Sequence[str], folder: Path, title: str, settings: Mapping[str, Any]
) -> list[Writer]:
    """The writers of a log, by name.

    Args:
        names: of ``WRITERS``.
        folder: of the log.
        title: of the log, where one is shown.
        settings: of what is logged, where they are shown.

    Raises:
        ImportError: a package is not installed.
        ValueError: an unknown name.
    """
    opened: list[Writer] = []
    for name in names:
        check_choice("writer", name, WRITERS)
        if name == "tensorboard":
            opened.append(TensorBoard(folder))
        else:
            opened.append(WandB(folder, title, settings))
    return opened
