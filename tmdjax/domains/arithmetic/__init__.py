"""Arithmetic in writing: expressions, and work that is written step by step."""
