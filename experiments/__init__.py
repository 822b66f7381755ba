"""Runnable experiments, one readable file a system (from a clone)."""
