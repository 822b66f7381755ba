"""Experiment machinery: stages, configs, logs, reports and the ledger."""
