"""Vocabulary: time convention, shape names, checks, keys, trees, files, registry.

``core.unroll`` applies a step many times and says where a rollout broke;
``core.compilation_cache`` keeps compiled programs between processes.
"""

from tmdjax.core import checks as checks
from tmdjax.core import conventions as conventions
from tmdjax.core import files as files
from tmdjax.core import prng as prng
from tmdjax.core import registry as registry
from tmdjax.core import trees as trees
from tmdjax.core import types as types
from tmdjax.core.unrolling import Unrolled as Unrolled
from tmdjax.core.unrolling import unroll as unroll
