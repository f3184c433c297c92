"""Audit a checkpoint: find the task, read the weights, measure, report."""
