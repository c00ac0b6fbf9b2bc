"""All rules for primitives that do not enter a program; those that do are `control_flow.CONTROL_RULES`."""

from lazyjax.difference.linear import ALGEBRAIC_RULES
from lazyjax.difference.piecewise import PIECEWISE_RULES
from lazyjax.difference.pooling import WINDOW_RULES
from lazyjax.difference.smooth import SMOOTH_RULES

# A new rule goes into one of these tables.
RULES = {**ALGEBRAIC_RULES, **SMOOTH_RULES, **PIECEWISE_RULES, **WINDOW_RULES}

COMPLEX_RULES = (
    *(set(ALGEBRAIC_RULES) - {"sqrt", "rsqrt"}),
    *("abs", "cos", "cosh", "cumprod", "exp", "exp2", "expm1", "logistic", "reduce_prod", "sin", "sinh", "tan", "tanh"),
)
"""Rules that hold for complex numbers too; roots and logarithms have branches there."""
