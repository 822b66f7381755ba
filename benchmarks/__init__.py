"""Ratios against a named rival, both measured in one run."""
