r"""Diagonal linear networks: what the flow of $\beta = u^2 - v^2$ from $u_0 = v_0 = \alpha 1$ selects, from l1 to l2.

On an underdetermined regression $X\beta = y$ the flow of the square loss conserves uv and ends at the minimizer of

$$Q_\alpha(\beta) = \sum_i \alpha^2 q(\beta_i/\alpha^2), \qquad q(z) = 2 - \sqrt{4 + z^2} + z\, \mathrm{arcsinh}(z/2),$$

among all interpolators. Its conditions are $\beta = 2\alpha^2 \sinh(X^T\nu)$, so $\nu$ minimizes the convex
$2\alpha^2 \sum_i (\cosh(x_i \cdot \nu) - 1) - y \cdot \nu$. As alpha grows this is least l2 (lazy), as it falls
least l1. The paper's scale is $\alpha^2$ here.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from lazyjax.experiments.figure import Figure, Number, check_counts, check_positive, check_rising, record
from lazyjax.experiments.student import check_double
from lazyjax.flow.gradient_flow import gradient_flow
from lazyjax.losses.square import square_loss
from lazyjax.models.maps import on_data, rescale
from lazyjax.models.shallow import diagonal_linear
from lazyjax.report.sweep import sweep

if TYPE_CHECKING:
    import xarray


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the figure is computed from.

    Attributes:
        d: Dimension of the inputs.
        n: Samples, fewer than d.
        sparsity: d*, nonzero coordinates of the truth, each 1/sqrt(d*).
        sigma: Standard deviation of the inputs' coordinates.
        alphas: Scales of the start, rising.
        horizon: Flow time; long, for rates of convergence fall with alpha.
        max_steps: Solver steps after which a flow is given up.

    Raises:
        ValueError: one of them out of its range.
    """

    d: int = 100
    n: int = 40
    sparsity: int = 5
    sigma: float = 1.0
    alphas: tuple[float, ...] = tuple(float(f"{10 ** (e / 2):.3g}") for e in range(-16, 3))
    horizon: float = 3e4
    max_steps: int = 2**19

    def __post_init__(self):
        check_counts(self, d=2, n=1, sparsity=1, max_steps=1)
        check_positive(self, "sigma", "alphas", "horizon")
        if not self.n < self.d or not self.sparsity <= self.d:
            msg = f"n must be below d and sparsity at most d, got n={self.n}, sparsity={self.sparsity}, d={self.d}."
            raise ValueError(msg)
        check_rising(self, "alphas")


PRESETS = {
    "small": Settings(d=20, n=8, sparsity=2, alphas=(1e-4, 1e-2, 1e-1, 1.0, 10.0), horizon=3e3),
    "default": Settings(),
    "paper": Settings(d=1000, n=100, sparsity=5),
}


def draw(settings: Settings, seed: Any) -> tuple[Float[Array, "n d"], Float[Array, " d"]]:
    r"""Inputs $x \sim N(0, \sigma^2 I)$ and the sparse truth."""
    x = settings.sigma * jr.normal(jr.key(seed), (settings.n, settings.d))
    truth = jnp.where(jnp.arange(settings.d) < settings.sparsity, settings.sparsity**-0.5, 0.0)
    return x, truth


def run_flow(x: Array, y: Array, alpha: Array, settings: Settings) -> dict[str, Any]:
    r"""The flow from one alpha up to the horizon, and what it conserves.

    In units of the start, $(u, v)/\alpha$, so that one tolerance serves all alpha: near the saddle at zero errors must
    be small against the start. Time there is $t/\alpha^2$.
    """
    w0 = {name: jnp.ones(x.shape[1]) for name in ("u", "v")}
    h = rescale(on_data(diagonal_linear(), x), alpha**2)
    times = jnp.stack([jnp.zeros_like(alpha), settings.horizon / alpha**2])
    flow = gradient_flow(
        h, square_loss(y), w0, times, save=("displacement",), rtol=1e-8, atol=1e-8, max_steps=settings.max_steps,
        throw=False,
    )  # fmt: skip
    u, v = (flow.displacement[name][-1] + 1 for name in ("u", "v"))
    found = {"flow": alpha**2 * (u**2 - v**2), "flow_loss": flow.loss[-1], "drift": jnp.max(jnp.abs(u * v - 1))}
    return {**found, "flow_steps": flow.stats["num_steps"], "result": flow.result}


def minimize_potential(x: np.ndarray, y: np.ndarray, alphas: tuple[float, ...]) -> np.ndarray:
    r"""The minimizers of $Q_\alpha$ among the interpolators, (alpha, d): the convex dual by SciPy's trust region.

    From the largest alpha down, each from the last one's dual point: $\nu$ grows only as log(1/alpha).

    Raises:
        ValueError: SciPy did not converge.
    """
    from scipy.optimize import minimize

    nu, found = np.zeros(len(y)), []
    for alpha in sorted(alphas, reverse=True):

        def dual(nu: np.ndarray, c: float = 2 * alpha**2) -> tuple[float, np.ndarray]:
            z = x.T @ nu
            return float(c * np.sum(2 * np.sinh(z / 2) ** 2) - y @ nu), c * x @ np.sinh(z) - y

        def hessian(nu: np.ndarray, c: float = 2 * alpha**2) -> np.ndarray:
            return (x * (c * np.cosh(x.T @ nu))) @ x.T

        with np.errstate(over="ignore"):  # a step too long is refused by its infinite value
            solved = minimize(dual, nu, jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-10})
        # A gradient that is NaN has not converged either.
        if not solved.success and not np.linalg.norm(solved.jac) <= 1e-6 * np.linalg.norm(y):
            msg = f"alphas: the potential's minimum at {alpha} was not found ({solved.message}); leave that one out."
            raise ValueError(msg)
        nu = solved.x
        found.append(2 * alpha**2 * np.sinh(x.T @ nu))
    return np.asarray(found[::-1])


def least_norms(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The interpolators of least l1 norm, by a linear program, and of least l2 norm.

    Raises:
        ValueError: SciPy did not solve the program.
    """
    from scipy.optimize import linprog

    d = x.shape[1]
    solved = linprog(np.ones(2 * d), A_eq=np.hstack([x, -x]), b_eq=y, bounds=(0, None), method="highs")
    if not solved.success:
        msg = f"x and y have no interpolator of least l1 norm that SciPy finds ({solved.message}); take other data."
        raise ValueError(msg)
    return solved.x[:d] - solved.x[d:], np.linalg.lstsq(x, y)[0]


def run(
    settings: Settings | None = None, *, seed: int = 0, folder: Path | None = None, progress: bool = False
) -> "xarray.Dataset":
    """Limits of the flow for every alpha, the potential's minimizers, and the solutions of least norm.

    Args:
        settings: None for those of the default size: about a minute on two cores.
        seed: Of the inputs.
        folder: Where finished flows are kept, for a run that is interrupted to go on.
        progress: Show a progress bar.

    Returns:
        A dataset over alpha and coordinate: "flow", "potential"; over coordinate: "l1", "l2", "truth"; over alpha:
        "drift" of what the flow conserves, "flow_loss", "flow_steps", "failed", "message".

    Raises:
        ValueError: JAX's default dtype is not float64; SciPy did not find the potential's minimum or the least l1
            norm.

    Source:
        Smith's report, section 4, after Woodworth et al. (2020); the dual form is ours.
    """
    check_double()
    settings = Settings() if settings is None else settings
    x, truth = draw(settings, seed)
    y = x @ truth
    # First what may fail, then the long work.
    inputs, targets = jax.device_get((x, y))
    l1, l2 = least_norms(inputs, targets)
    least = minimize_potential(inputs, targets, settings.alphas)
    found = sweep(
        lambda alpha, x, y: run_flow(x, y, alpha, settings),
        over={"alpha": list(settings.alphas)}, shared={"x": x, "y": y}, dims={"flow": ("coordinate",)}, chunk=1,
        folder=folder, settings=dataclasses.asdict(settings), progress=progress,
    )  # fmt: skip
    data = found.assign(
        potential=(("alpha", "coordinate"), least),
        l1=("coordinate", l1), l2=("coordinate", l2), truth=("coordinate", np.asarray(truth)),
    )  # fmt: skip
    return record(data, settings, seed, variant="u^2 - v^2 from u = v = alpha; the paper's scale is alpha^2")


def excess(data: "xarray.Dataset", name: str) -> "xarray.Dataset":
    """Over alpha: l1 and l2 norm of "flow" or "potential" over the least possible less 1, and the test error."""
    beta = data[name]
    ratio = {"l1": abs(beta).sum("coordinate") / abs(data["l1"]).sum(), "l2": (beta**2).sum("coordinate") ** 0.5}
    ratio["l2"] = ratio["l2"] / float((data["l2"] ** 2).sum()) ** 0.5
    error = data.attrs["setting_sigma"] ** 2 * ((beta - data["truth"]) ** 2).sum("coordinate")
    out = data[[]].assign({f"excess_{kind}": values - 1 for kind, values in ratio.items()})
    return out.assign(test_error=0.5 * error)


def numbers(data: "xarray.Dataset") -> list[Number]:
    """The flow beside the exact potential, and the ends of the range beside l1 and l2."""
    gap = abs(data["flow"] - data["potential"]).max("coordinate") / abs(data["potential"]).max("coordinate")
    flow, last = excess(data, "flow"), data["alpha"].values[[0, -1]]
    zero = float((data["truth"] ** 2).sum()) * 0.5 * data.attrs["setting_sigma"] ** 2
    return [
        Number("largest relative distance of flow and potential", float(gap.max()), 0.0, "theory: none"),
        Number("largest relative drift of u v", float(data["drift"].max()), 0.0, "conserved"),
        Number(
            f"excess l1 norm at alpha = {last[0]:g}", float(flow["excess_l1"][0]), 0.0, "limit, logarithmically slow"
        ),
        Number(f"excess l2 norm at alpha = {last[1]:g}", float(flow["excess_l2"][-1]), 0.0, "limit, as alpha^-8"),
        Number(f"test error at alpha = {last[0]:g}", float(flow["test_error"][0]), None, f"zero predictor {zero:.3g}"),
        Number(f"test error at alpha = {last[1]:g}", float(flow["test_error"][-1])),
        Number("flows that stopped early", float(data["failed"].sum())),
    ]


FIGURE = Figure("diagonal linear nets: from least l1 to least l2 norm as alpha grows", PRESETS, run, numbers)
