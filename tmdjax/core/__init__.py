"""Vocabulary: time convention, shape names, checks, keys, trees, registry."""

from tmdjax.core import checks, conventions, prng, registry, trees, types

__all__ = ["checks", "conventions", "prng", "registry", "trees", "types"]
