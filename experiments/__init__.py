"""Runnable experiments, one readable file a system (from a clone)."""

import signal
import sys

if sys.argv[0] == "-m":  # a command that is still imported has nothing to say or save
    signal.signal(signal.SIGINT, signal.SIG_DFL)
