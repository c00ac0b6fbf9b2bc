"""Transforms of the program of h: its differences without cancellation (`finite_jvp`), its kinks as gates (`gated`).

A new rule for differences is one function, and one line of the table at the end of the file of its kind: `linear`
(linear, bilinear, algebraic), `smooth` (elementwise), `piecewise` (maxima, rounding), `pooling` (windows) or
`control_flow`. A new kind of kink is one function, and one line of the table in `gates`.
"""

from lazyjax.difference.finite_jvp import finite_jvp as finite_jvp
from lazyjax.difference.finite_jvp import finite_value_and_jvp as finite_value_and_jvp
from lazyjax.difference.gates import Gated as Gated
from lazyjax.difference.gates import Kink as Kink
from lazyjax.difference.gates import NoGatesError as NoGatesError
from lazyjax.difference.gates import gated as gated
