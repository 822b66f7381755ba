"""Conversations as the text a model was trained to continue."""

from collections.abc import Mapping, Sequence
from typing import Any

from tmdjax.core.checks import check_choice

ROLES = ("system", "user", "assistant")

_START, _END = "<|im_start|>", "<|im_end|>"


CHAT_TEMPLATES = {
    "chatml": None,
    "qwen2": "You are a helpful assistant.",
    "qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "qwen3": None,
    "smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
}
"""System messages of conversations that bring none, by template; None adds none.

All are ChatML: a mark with the role, a line break, the content, an end mark.
"""


def render_chat(
    messages: Sequence[Mapping[str, str]],
    template: str = "chatml",
    *,
    generation: bool = True,
) -> str:
    """Renders a conversation.

    Args:
        messages: ``{'role': 'system' | 'user' | 'assistant', 'content': text}``, the
            system message first if there is one.
        template: a name in ``CHAT_TEMPLATES``. 'qwen3' is its form for messages
            without tools: thoughts (``<think>...</think>``) of answers before the last
            message of the user are left out, and an assistant's message at the end has
            a pair of marks for them, an empty one where it has no thoughts.
        generation: open the answer of the assistant at the end.

    Returns:
        Text for a tokenizer's ``encode``, which reads the marks as special tokens;
        the answer ends with ``<|im_end|>``.

    Raises:
        ValueError: an unknown template or role, no messages, a system message that
            is not the first, a message with other keys, or content that holds a
            mark itself.
    """
    check_choice("template", template, CHAT_TEMPLATES)
    system = CHAT_TEMPLATES[template]
    check_messages(messages, (_START, _END))
    parts = []
    for index, message in enumerate(messages):
        if set(message) != {"role", "content"}:
            raise ValueError(
                f"message {index} has the keys {sorted(message)}; give 'role' and "
                f"'content'."
            )
        check_choice(f"role of message {index}", message["role"], ROLES)
        if message["role"] == "system" and index:
            raise ValueError(
                f"message {index} is of the system; only the first may be."
            )
        parts.append((message["role"], message["content"]))
    if template == "qwen3":
        parts = _thoughts_of_the_last_turn(parts)
    if system is not None and parts[0][0] != "system":
        parts.insert(0, ("system", system))
    text = "".join(f"{_START}{role}\n{content}{_END}\n" for role, content in parts)
    return text + (f"{_START}assistant\n" if generation else "")


def check_messages(messages: Sequence[Mapping[str, Any]], marks: Sequence[str]) -> None:
    """Refuses a conversation without messages, or with marks in what they say.

    Args:
        messages: with 'content', if any.
        marks: texts that would end or begin a message.

    Raises:
        ValueError: no messages, or a content that holds a mark.
    """
    if not messages:
        raise ValueError("messages is empty; give at least one, of the user, say.")
    for index, message in enumerate(messages):
        held = [mark for mark in marks if mark in str(message.get("content"))]
        if held:
            raise ValueError(
                f"the content of message {index} holds {held[0]!r}, which would end or "
                f"begin a message; remove it."
            )


def _thoughts_of_the_last_turn(
    parts: Sequence[tuple[str, str]],
) -> list[tuple[str, str]]:
    """Roles and contents as the template of Qwen3 shows thoughts."""
    users = [index for index, (role, _) in enumerate(parts) if role == "user"]
    asked = users[-1] if users else len(parts) - 1
    found = []
    for index, (role, content) in enumerate(parts):
        if role == "assistant":
            before, mark, after = content.rpartition("</think>")
            thoughts = before.split("</think>")[0].split("<think>")[-1].strip("\n")
            content = after.lstrip("\n") if mark else content
            if index > asked and (index == len(parts) - 1 or thoughts):
                content = f"<think>\n{thoughts}\n</think>\n\n" + content.lstrip("\n")
        found.append((role, content))
    return found
