"""Runs a step as planned: specs, what a plan adds inside a step, pipelines."""
