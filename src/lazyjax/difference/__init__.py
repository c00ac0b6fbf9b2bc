"""The difference [h(w0 + eps u) - h(w0)]/eps, exact to rounding at every eps, by a transform of the program of h.

A new primitive rule is one function, and one line of the table at the end of the file of its kind: `linear` (linear,
bilinear, algebraic), `smooth` (elementwise), `piecewise` (maxima, rounding), `pooling` (windows) or `control_flow`.
"""

from lazyjax.difference.finite_jvp import finite_jvp as finite_jvp
from lazyjax.difference.finite_jvp import finite_value_and_jvp as finite_value_and_jvp
