"""Decoder language models: network, cache, log-probabilities of tokens."""
