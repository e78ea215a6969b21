"""Evaluation of visual token pruning: tables, efficiency, figures."""
