"""Reinforcement learning rules: advantages, surrogates, weights, KL estimators."""
