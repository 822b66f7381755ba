"""The small alphabet of the procedural tasks, for a ``generation.CharTokenizer``."""

from tmdjax.domains.arithmetic.written_work import ANSWER, END, PASS

PAD = "_"
"""Padding: no text holds it."""

START = ">"
"""Opens a prompt."""

GIVEN = "="
"""Closes a prompt."""

CHARACTERS = f"{START}{ANSWER}{END}{PASS}{GIVEN}0123456789+-*/(),:srdk"
"""What texts consist of; a tokenizer puts the padding before them."""
