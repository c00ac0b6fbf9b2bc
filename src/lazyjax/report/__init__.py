"""Sweeps over alpha, and the report on one model."""

from lazyjax.report.diagnose import LazinessReport as LazinessReport
from lazyjax.report.diagnose import diagnose as diagnose
from lazyjax.report.sweep import sweep as sweep
from lazyjax.report.verdict import Slope as Slope
