"""Sets of videos, with labels or prompts."""
