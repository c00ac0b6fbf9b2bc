"""The figures of the paper, one experiment per file.

A file's name begins with its figures, if the paper has them. It holds the `Settings`, a pure `run` from settings to a
labeled dataset, the `numbers` of that dataset next to their references, and `draw`, its drawing; a `Figure` at its end
carries all of these.

- Figures 1(a), 1(b), 6: `fig1ab_fig6_trajectories`, the units of a student in the plane.
- Figure 1(c): `fig1c_student_scale`, test loss against the scale of the start.
- Figure 2(a): `fig2a_student_width`, test loss against the width.
- Figure 2(b): `fig2b_population_descent`, population loss of a student with too few units.
- Figures 3(a), 7(a): `fig3a_fig7a_deep_scale`, a deep network against alpha.
- Figure 3(b): `fig3b_deep_wide`, wide deep networks, linearized and not.
- Figure 4: `fig4_limit_kernel`, tangent kernels of random nets and their limit.
- Figure 7(b): `fig7b_deep_spectrum`, the spectrum of a deep network's tangent kernel.
- Not in the paper: `deep_precision` (float32 at large alpha), `sparse_regression` (diagonal linear nets, from least l1
  to least l2 norm), `kappa_width` (kappa against the width), `lazy_rates` (the rates of Theorem 2.2).

`figure` has the list of all figures by the name that `lazyjax reproduce` has for them; `student`, `deep` and `descent`
hold what several figures share.
"""

from lazyjax.experiments.figure import FIGURES as FIGURES
from lazyjax.experiments.figure import Figure as Figure
from lazyjax.experiments.figure import Number as Number
from lazyjax.experiments.figure import find as find
from lazyjax.experiments.figure import settings_of as settings_of
