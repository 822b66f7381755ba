"""The chat template that a checkpoint carries: a Jinja program, run in a sandbox."""

import dataclasses
import datetime
import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tmdjax.core.checks import check_choice
from tmdjax.core.files import text_of
from tmdjax.core.optional import import_optional
from tmdjax.generation.byte_pairs import CONTROL, gguf_id, token_name
from tmdjax.generation.chat import check_messages
from tmdjax.models.checkpoints.gguf import gguf_value, open_gguf
from tmdjax.models.checkpoints.layout import read_json

_LONGEST = 1_000_000
"""Characters of a template, or of a text that it repeats."""
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations as the checkpoint's authors wrote it down.

    Attributes:
        source: the template, in Jinja.
        variables: what it may use beside the messages, such as 'bos_token'.
        marks: texts that no message may hold, as they would end or begin one.

    Example:
        >>> template = ChatTemplate("{{ messages[0].content }};")
        >>> template([{"role": "user", "content": "Hello"}])
        'Hello;'
    """

    source: str
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    marks: tuple[str, ...] = ()

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        generation: bool = True,
        date: datetime.datetime | None = None,
        **variables: Any,
    ) -> str:
        """Renders a conversation.

        Args:
            messages: with 'role' and 'content', and what else the template reads.
            generation: open the answer of the assistant at the end.
            date: of the day, for templates that write it; None gives them none, so that
                a prompt is the same every day.
            **variables: more that the template reads, such as ``enable_thinking``.

        Returns:
            Text for a tokenizer's ``encode``, which adds nothing: the template writes
            the token that starts a text, where there is one.

        Raises:
            ImportError: jinja2 is absent.
            ValueError: no messages, a content that holds a mark, or what the template
                refuses or cannot do.
        """
        check_messages(messages, self.marks)
        if date is not None:
            variables["strftime_now"] = date.strftime
        try:
            return _compiled(self.source).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=generation,
                **{"tools": None, "documents": None, **self.variables, **variables},
            )
        except Exception as error:  # whatever a program of strangers may raise
            hint = "; give date=" if "strftime_now" in str(error) else ""
            raise ValueError(
                f"the chat template cannot render these {len(messages)} messages: "
                f"{type(error).__name__}: {error}{hint}"
            ) from error


def load_chat_template(
    path: str | os.PathLike[str], name: str = "default"
) -> ChatTemplate:
    """The template of a checkpoint.

    Args:
        path: of a folder in the Hugging Face layout, with chat_template.jinja,
            chat_template.json or the key 'chat_template' of tokenizer_config.json (read
            in this order); or of a GGUF file.
        name: where a checkpoint has several, which.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it has no template, or none of that name, or a file is no JSON.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is absent; give a checkpoint.")
    found, variables, marks = (_of_gguf if path.is_file() else _of_folder)(path)
    if not found:
        raise ValueError(
            f"{path} has no chat template; name one of generation.CHAT_TEMPLATES, or "
            f"write the prompts of a base model yourself."
        )
    check_choice("the name of a chat template", name, found)
    marks |= {*variables.values()}
    return ChatTemplate(found[name], variables, tuple(sorted(marks)))


def _of_folder(folder: Path) -> tuple[dict[str, str], dict[str, str], set[str]]:
    config = read_json(folder / "tokenizer_config.json", optional=True)
    chat = read_json(folder / "chat_template.json", optional=True)
    given = chat.get("chat_template", config.get("chat_template"))
    try:
        if isinstance(given, list):
            found = {entry["name"]: entry["template"] for entry in given}
        else:
            found = {} if given is None else {"default": given}
        if not all(isinstance(text, str) for text in found.values()):
            raise TypeError
    except (TypeError, KeyError):
        raise ValueError(
            f"{folder} has a chat_template that is neither a text nor a list of names "
            f"and templates. Copy the file again."
        ) from None
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = text_of(file, _LONGEST)
    if (folder / "chat_template.jinja").exists():
        found["default"] = text_of(folder / "chat_template.jinja", _LONGEST)
    names = {key: token_name(config.get(key)) for key in _SPECIAL}
    variables = {key: name for key, name in names.items() if name is not None}
    whole = read_json(folder / "tokenizer.json", optional=True)
    by_id = config.get("added_tokens_decoder", {})
    added = [*by_id.values()] if isinstance(by_id, dict) else [by_id]
    added += whole.get("added_tokens") or []
    # special where nothing is said, as the tokenizer has them
    special = [t for t in added if not isinstance(t, Mapping) or t.get("special", True)]
    marks = {name for name in map(token_name, special) if name is not None}
    return found, variables, marks


def _of_gguf(path: Path) -> tuple[dict[str, str], dict[str, str], set[str]]:
    reader = open_gguf(path)
    key = "tokenizer.chat_template"
    names = {n.removeprefix(f"{key}."): n for n in reader.fields if n.startswith(key)}
    found = {
        "default" if name == key else name: gguf_value(reader, field)
        for name, field in names.items()
    }
    found = {name: text for name, text in found.items() if isinstance(text, str)}
    tokens = gguf_value(reader, "tokenizer.ggml.tokens", [])
    types = gguf_value(reader, "tokenizer.ggml.token_type", [])
    variables = {}
    for name in ("bos", "eos"):
        index = gguf_id(reader, name, path)
        if index is not None:
            variables[f"{name}_token"] = tokens[index]
    return found, variables, {t for t, kind in zip(tokens, types) if kind == CONTROL}


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """The template as transformers compiles it: trimmed blocks, loop controls."""
    jinja = import_optional("jinja2", "a checkpoint's chat template", "llm")
    sandbox = import_optional("jinja2.sandbox", "a checkpoint's chat template", "llm")
    extensions = import_optional("jinja2.ext", "a checkpoint's chat template", "llm")

    class Generation(extensions.Extension):
        """``{% generation %}`` marks what an assistant wrote; it changes no text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    class Bounded(sandbox.ImmutableSandboxedEnvironment):
        """Products and powers are no larger than a template may be long.

        Without it ``{{ 'a' * 10 ** 10 }}`` takes 10 GB where it is compiled.
        """

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            both = left, right
            sizes = [len(x) if hasattr(x, "__len__") else abs(x) for x in both]
            repeats = any(hasattr(x, "__len__") for x in both)
            bits = math.log2(1 + sizes[0]) * sizes[1] if operator == "**" else 0
            if bits > 64 or (repeats and math.prod(sizes) > _LONGEST):
                raise jinja.TemplateError(f"{operator} of {sizes} is too large")
            return super().call_binop(context, operator, left, right)

    environment = Bounded(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja.Undefined,
        extensions=[Generation, extensions.loopcontrols],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    del environment.globals["lipsum"]  # texts of any length
    return environment.from_string(source)
