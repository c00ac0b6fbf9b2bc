"""Axes in one style, and the figures of a report."""
