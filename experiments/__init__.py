"""Runnable modules, one question each: `python -m experiments.NAME`."""
