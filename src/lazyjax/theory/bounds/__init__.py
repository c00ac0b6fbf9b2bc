r"""One function per theorem: numbers in, numbers out.

Where each is: theorems 2.2 and 2.3 in `finite_horizon_2_2_and_2_3.py`, theorem 2.4 with lemmas B.1 and B.2 in
`overparameterized_2_4.py`, theorem 2.5 in `underparameterized_2_5.py`, the lecture notes in `lecture_notes.py`,
proposition A.1, wide nets and homogeneous models in `wide_and_homogeneous.py`.

A bound takes what it needs as numbers: norms, Lipschitz constants, a loss, the scale, a time. Python floats and arrays
mix; they broadcast against each other (give alphas the shape (a, 1) and times (t,) for a table), under `jax.jit` and
`jax.vmap` too. alpha = inf is an ordinary value, at which the bounds of displacements and gaps are 0. Outside a
trace an argument out of its range is an error; inside one it passes.

**Metrics.** Norms of outputs, of Dh and of its Lipschitz constant are in the metric of F that the loss has (see
`lazyjax.losses`): with 1/n, singular values are $1/\sqrt n$ those of the plain Jacobian. Norms of parameters are
Euclidean. Times are flow times of $F_\alpha = R(\alpha h)/\alpha^2$, except for the lecture notes' results.

**Constants.** The proofs use $Lip(h)$ and $Lip(Dh)$ only along the flow. So a computed flow proves its own bound, with
the suprema over its times of $\|Dh(w(t))\|$ and $\|Dh(w(t)) - Dh(w_0)\|/|w(t) - w_0|$. Sampled on a ball they would be
estimates from below, and prove nothing. Models with kinks (ReLU) are outside all of these theorems.

**Names** of bounds are those of what they bound in `lazyjax.Comparison`: `displacement_norm`, `output_gap`,
`param_gap`.

**As printed.** Sources err; the corrected form is returned, and each docstring says what was corrected. With
`printed=True` some functions return what the source prints, be it true and weaker or false, as the docstring says.

Sources: Chizat, Oyallon, Bach, On lazy training in differentiable programming (2019) and its supplement; lecture notes
on lazy training; Smith's report. Full references are in `docs/sources.md`.
"""

from lazyjax.theory.bounds.finite_horizon_2_2_and_2_3 import (
    HorizonBounds,
    lip_sigma,
    theorem_2_2,
    theorem_2_2_radius,
    theorem_2_3,
    theorem_2_3_radius,
)
from lazyjax.theory.bounds.lecture_notes import (
    JacobianBounds,
    LectureBounds,
    lecture_lemma_4,
    lecture_lemma_5,
    lecture_lemma_6,
    lecture_theorem_2,
)
from lazyjax.theory.bounds.overparameterized_2_4 import (
    OverparameterizedBounds,
    lemma_b_1,
    lemma_b_2,
    theorem_2_4,
)
from lazyjax.theory.bounds.underparameterized_2_5 import (
    UnderparameterizedBounds,
    theorem_2_5,
)
from lazyjax.theory.bounds.wide_and_homogeneous import (
    HomogeneousFlow,
    homogeneous_flow,
    kappa_two_layer,
    proposition_a_1,
    smith_inequality,
)

__all__ = [
    "HomogeneousFlow",
    "HorizonBounds",
    "JacobianBounds",
    "LectureBounds",
    "OverparameterizedBounds",
    "UnderparameterizedBounds",
    "homogeneous_flow",
    "kappa_two_layer",
    "lecture_lemma_4",
    "lecture_lemma_5",
    "lecture_lemma_6",
    "lecture_theorem_2",
    "lemma_b_1",
    "lemma_b_2",
    "lip_sigma",
    "proposition_a_1",
    "smith_inequality",
    "theorem_2_2",
    "theorem_2_2_radius",
    "theorem_2_3",
    "theorem_2_3_radius",
    "theorem_2_4",
    "theorem_2_5",
]
