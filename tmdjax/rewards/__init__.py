"""Rewards: exact checkers, readers, and scorers that run on the host."""
