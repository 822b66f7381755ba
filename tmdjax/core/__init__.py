"""Vocabulary: time convention, shape names, checks, keys, trees, files, registry.

``core.compilation_cache`` keeps compiled programs between processes.
"""

from tmdjax.core import checks, conventions, files, prng, registry, trees, types

__all__ = ["checks", "conventions", "files", "prng", "registry", "trees", "types"]
