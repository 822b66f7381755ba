"""Conversations as the text a model was trained to continue."""

from collections.abc import Mapping, Sequence

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
            without tools or thoughts.
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
    if not messages:
        raise ValueError("messages is empty; give at least one, of the user, say.")
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
        for mark in (_START, _END):
            if mark in message["content"]:
                raise ValueError(
                    f"the content of message {index} holds {mark!r}, which would end "
                    f"or begin a message; remove it."
                )
        parts.append((message["role"], message["content"]))
    if system is not None and parts[0][0] != "system":
        parts.insert(0, ("system", system))
    text = "".join(f"{_START}{role}\n{content}{_END}\n" for role, content in parts)
    return text + (f"{_START}assistant\n" if generation else "")
