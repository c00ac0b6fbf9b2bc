"""The figures of a report, spectra of kernels, and the style of all figures.

matplotlib is imported when a figure is drawn, by its object interface: no window, no global state. Colors are those of
Okabe and Ito, which color-blind readers can tell apart; no line is identified by its color alone.
"""

from lazyjax.plot.axes import encode as encode
from lazyjax.plot.report import plot_curves as plot_curves
from lazyjax.plot.report import plot_drift as plot_drift
from lazyjax.plot.report import plot_eigenvalues as plot_eigenvalues
from lazyjax.plot.report import plot_gaps as plot_gaps
from lazyjax.plot.report import plot_scores as plot_scores
from lazyjax.plot.report import report_figures as report_figures
from lazyjax.plot.spectrum import plot_spectrum as plot_spectrum
