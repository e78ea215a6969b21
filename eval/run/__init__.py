"""Evaluating: jobs, workers, journals, times."""
