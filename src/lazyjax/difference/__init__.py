"""The difference [h(w0 + eps u) - h(w0)]/eps, exact to rounding at every eps, by a transform of the program of h."""

from lazyjax.difference.finite_jvp import finite_jvp as finite_jvp
