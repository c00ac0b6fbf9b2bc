r"""Diagonal linear networks: what the flow of $\beta = u^2 - v^2$ from $u_0 = v_0 = \alpha 1$ selects, from l1 to l2.

On an underdetermined regression $X\beta = y$ the flow of the square loss conserves uv and ends at the minimizer of

$$Q_\alpha(\beta) = \sum_i \alpha^2 q(\beta_i/\alpha^2), \qquad q(z) = 2 - \sqrt{4 + z^2} + z\, \mathrm{arcsinh}(z/2),$$

among all interpolators. Its conditions are $\beta = 2\alpha^2 \sinh(X^T\nu)$, so $\nu$ minimizes the convex
$2\alpha^2 \sum_i (\cosh(x_i \cdot \nu) - 1) - y \cdot \nu$. As alpha grows the l2 norm is least (lazy), as alpha
decreases the l1 norm. The paper's scale is $\alpha^2$ here.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from lazyjax.experiments.figure import Figure, Number, check_counts, check_increasing, check_positive, record
from lazyjax.experiments.student import check_double
from lazyjax.flow.gradient_flow import gradient_flow
from lazyjax.losses.square import square_loss
from lazyjax.models.maps import on_data, rescale
from lazyjax.models.shallow import diagonal_linear
from lazyjax.plot.axes import BLACK, BLUE, FONT, ORANGE, draw_legend, make_axes, note_stopped
from lazyjax.report.sweep import sweep

if TYPE_CHECKING:
    import matplotlib.figure
    import xarray


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of the figure.

    Attributes:
        d: Dimension of the inputs.
        n: Samples, fewer than d.
        sparsity: d*, nonzero coordinates of the truth, each 1/sqrt(d*).
        sigma: Standard deviation of the inputs' coordinates.
        alphas: Scales of the start, increasing.
        horizon: Flow time; long, because the rate of convergence decreases with alpha.
        max_steps: Solver steps after which a flow is given up.

    Raises:
        ValueError: One of them is out of its range.
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
        check_increasing(self, "alphas")


PRESETS = {
    "small": Settings(d=20, n=8, sparsity=2, alphas=(1e-4, 1e-2, 1e-1, 1.0, 10.0), horizon=3e3),
    "default": Settings(),
    "paper": Settings(d=1000, n=100, sparsity=5),
}


def sample(settings: Settings, seed: Any) -> tuple[Float[Array, "n d"], Float[Array, " d"]]:
    r"""Draw inputs $x \sim N(0, \sigma^2 I)$, and return them with the sparse truth."""
    x = settings.sigma * jr.normal(jr.key(seed), (settings.n, settings.d))
    truth = jnp.where(jnp.arange(settings.d) < settings.sparsity, settings.sparsity**-0.5, 0.0)
    return x, truth


def run_flow(x: Array, y: Array, alpha: Array, settings: Settings) -> dict[str, Any]:
    r"""Follow the flow from one alpha up to the horizon, and check what it conserves.

    The unit is the start, $(u, v)/\alpha$, so that one tolerance serves all alpha: near the saddle at zero errors must
    be small compared with the start. Time is then $t/\alpha^2$.
    """
    w0 = {name: jnp.ones(x.shape[1]) for name in ("u", "v")}
    h = rescale(on_data(diagonal_linear(), x), alpha**2)
    times = jnp.stack([jnp.zeros_like(alpha), settings.horizon / alpha**2])
    options = {"save": ("displacement",), "rtol": 1e-8, "atol": 1e-8, "throw": False}
    flow = gradient_flow(h, square_loss(y), w0, times, max_steps=settings.max_steps, **options)
    u, v = (flow.displacement[name][-1] + 1 for name in ("u", "v"))
    found = {"flow": alpha**2 * (u**2 - v**2), "flow_loss": flow.loss[-1], "drift": jnp.max(jnp.abs(u * v - 1))}
    return {**found, "flow_steps": flow.stats["num_steps"], "result": flow.result}


def minimize_potential(x: np.ndarray, y: np.ndarray, alphas: tuple[float, ...]) -> np.ndarray:
    r"""Return the minimizers of $Q_\alpha$ among the interpolators, (alpha, d), by the convex dual.

    SciPy's trust region starts at the largest alpha, and then each time at the dual point of the one before: $\nu$
    grows only as log(1/alpha).

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
    """Return the interpolators of least l1 norm, by a linear program, and of least l2 norm.

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
    """Compute the limits of the flow for every alpha, the potential's minimizers, and the solutions of least norm.

    Args:
        settings: None for those of the default size: about a minute on two cores.
        seed: The seed of the inputs.
        folder: Where finished flows are kept, so that an interrupted run can continue.
        progress: Show a progress bar.

    Returns:
        A dataset over alpha and coordinate: "flow", "potential"; over coordinate: "l1", "l2", "truth"; over alpha:
        "drift" of what the flow conserves, "flow_loss", "flow_steps", "failed", "message".

    Raises:
        ValueError: JAX's default dtype is not float64; SciPy did not find the potential's minimum or the least l1
            norm.

    Source:
        Smith's report, section 4, after Woodworth et al. (2020), see docs/sources.md; the dual form is ours.
    """
    check_double()
    settings = Settings() if settings is None else settings
    x, truth = sample(settings, seed)
    y = x @ truth
    # First what may fail, then what takes long.
    inputs, targets = jax.device_get((x, y))
    l1, l2 = least_norms(inputs, targets)
    least = minimize_potential(inputs, targets, settings.alphas)
    found = sweep(
        lambda alpha, x, y: run_flow(x, y, alpha, settings),
        over={"alpha": list(settings.alphas)},
        shared={"x": x, "y": y},
        dims={"flow": ("coordinate",)},
        chunk=1,
        folder=folder,
        settings=dataclasses.asdict(settings),
        progress=progress,
    )
    data = found.assign(
        potential=(("alpha", "coordinate"), least),
        l1=("coordinate", l1),
        l2=("coordinate", l2),
        truth=("coordinate", np.asarray(truth)),
    )
    return record(data, settings, seed, variant="u^2 - v^2 from u = v = alpha; the paper's scale is alpha^2")


def excess(data: "xarray.Dataset", name: str) -> "xarray.Dataset":
    """Return by alpha the excess l1 and l2 norms of "flow" or "potential" over the least possible, and the test error.

    The excess is the norm over the least possible one, minus 1.
    """
    beta = data[name]
    ratio = {"l1": abs(beta).sum("coordinate") / abs(data["l1"]).sum(), "l2": (beta**2).sum("coordinate") ** 0.5}
    ratio["l2"] = ratio["l2"] / float((data["l2"] ** 2).sum()) ** 0.5
    error = data.attrs["setting_sigma"] ** 2 * ((beta - data["truth"]) ** 2).sum("coordinate")
    out = data[[]].assign({f"excess_{kind}": values - 1 for kind, values in ratio.items()})
    return out.assign(test_error=0.5 * error)


def numbers(data: "xarray.Dataset") -> list[Number]:
    """List how far the flow is from the exact minimizer, and the ends of the range next to least l1 and l2."""
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


def draw(data: "xarray.Dataset") -> "matplotlib.figure.Figure":
    """Draw excess norms and below them the test error against alpha; dots are the flow, lines the potential."""
    figure, (upper, lower) = make_axes(2, share=False)
    flow, potential = excess(data, "flow"), excess(data, "potential")
    alphas = np.asarray(data["alpha"], np.float64)
    for kind, color, marker, label in (("l1", BLUE, "o", r"$\ell_1$"), ("l2", ORANGE, "s", r"$\ell_2$")):
        upper.plot(alphas, potential[f"excess_{kind}"], color=color, linewidth=1.2, label=rf"least $Q_\alpha$, {label}")
        values = flow[f"excess_{kind}"]
        upper.plot(alphas, values, marker, color=color, markersize=4, label=f"flow, {label}")
    upper.set_ylabel("excess norm over\nthe least possible", fontsize=FONT + 1)
    lower.plot(alphas, potential["test_error"], color=BLACK, linewidth=1.2, label=r"least $Q_\alpha$")
    lower.plot(alphas, flow["test_error"], "o", color=BLACK, markersize=4, label="flow")
    for name, color, dashes in (("l1", BLUE, "--"), ("l2", ORANGE, ":")):
        error = 0.5 * data.attrs["setting_sigma"] ** 2 * float(((data[name] - data["truth"]) ** 2).sum())
        lower.axhline(error, color=color, linestyle=dashes, linewidth=1, label=rf"least $\ell_{name[1]}$", zorder=0)
    lower.set_ylabel("test error", fontsize=FONT + 1)
    lower.set_xlabel(r"scale of the start, $u_0=v_0=\alpha$", fontsize=FONT + 1)
    for ax in (upper, lower):
        ax.set_xscale("log")
        ax.set_ylim(bottom=0)
        draw_legend(ax)
    note_stopped(lower, data)
    return figure


FIGURE = Figure(
    title="diagonal linear nets: from least l1 to least l2 norm as alpha grows",
    presets=PRESETS,
    run=run,
    numbers=numbers,
    draw=draw,
)
