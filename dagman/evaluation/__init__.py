"""Evaluation: metrics with their empty cases, paired statistics and the report."""
