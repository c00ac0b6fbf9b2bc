"""Sweeps over alpha, and the report on one model."""
