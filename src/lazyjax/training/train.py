r"""Minibatch training at any scale alpha, of deep networks too, in the displacement coordinates of the flows."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from tqdm import tqdm

from lazyjax._core.checks import check_inputs, is_concrete, split_params
from lazyjax._core.tables import format_table
from lazyjax._core.types import Model, Params
from lazyjax.flow.result import RESULTS, Result, as_result
from lazyjax.training.arguments import (
    DEFAULTS,
    LossOf,
    TrainingOptions,
    check_count,
    check_difference,
    make_lanes,
    make_setup,
)
from lazyjax.training.checkpoint import Checkpoints, configuration
from lazyjax.training.lanes import Lanes, begin, choose_size, pick_lanes, run_epoch
from lazyjax.training.step import Lane, State, TrainingSetup, batch_rows, outputs_of


class Training(eqx.Module):
    r"""The end of a training; made by `train`. "lanes?" is an axis of lanes if `train` was given one.

    Attributes:
        params: The final w, of w0's structure, (lanes?, ...) each leaf.
        displacement: The final $u = \alpha(w - w_0)$, a tree of w0's coordinates: exact where w - w0 rounds.
        loss: Mean of R over the batches of an epoch, as they came and before their steps, (lanes?, epochs).
        accuracy: Mean of the share of right answers over the same batches; None if the targets are no classes.
        test_loss: R on the test data after every epoch, (lanes?, epochs); None without test data.
        test_accuracy: Share of right answers on the test data; None if the targets are no classes.
        alpha: The scales, (lanes?,).
        result: `RESULTS.successful` or `RESULTS.nonfinite` (a loss or parameters became NaN or infinite), one per
            lane.
        epochs: The number of epochs trained, those before an interruption included.
    """

    params: Params
    displacement: Params
    loss: Float[Array, "*lanes epochs"]
    accuracy: Float[Array, "*lanes epochs"] | None
    test_loss: Float[Array, "*lanes epochs"] | None
    test_accuracy: Float[Array, "*lanes epochs"] | None
    alpha: Float[Array, "*lanes"]
    result: Result
    epochs: int = eqx.field(static=True)

    def __str__(self) -> str:
        """Return a table with a line per lane: what was measured in the last epoch, and how the training ended."""
        if not is_concrete(self):
            return eqx.tree_pformat(self)
        names = [name for name in ("loss", "accuracy", "test_loss", "test_accuracy") if getattr(self, name) is not None]
        alphas, results = np.ravel(self.alpha), np.ravel(jtu.tree_leaves(self.result)[0])
        last = {name: np.ravel(np.asarray(getattr(self, name))[..., -1]) for name in names}
        (fine,) = jtu.tree_leaves(as_result(RESULTS.successful))
        rows = [
            (f"{alpha:g}", *(f"{last[name][lane]:.4g}" for name in names), "" if results[lane] == fine else "diverged")
            for lane, alpha in enumerate(alphas)
        ]
        table = format_table([("alpha", *names, ""), *rows], ">")
        return f"Training of {self.epochs} epochs; the last one:\n{table}"

    __repr__ = __str__


def train(
    f: Model,
    w0: Params,
    x: ArrayLike,
    y: ArrayLike,
    optimizer: optax.GradientTransformation,
    *,
    epochs: int,
    key: Array,
    batch_size: int = 128,
    loss: LossOf = "square",
    alpha: ArrayLike = 1.0,
    test: tuple[ArrayLike, ArrayLike] | None = None,
    throw: bool = True,
    options: TrainingOptions = DEFAULTS,
) -> Training:
    r"""Train $F_\alpha(w) = R(\alpha h(w))/\alpha^2$ on minibatches, h = f - f(w0) the centered model.

    On a batch B, $h_B(w) = f(w, x_B) - f(w_0, x_B)$, exactly zero at w0. The training runs in
    $u = \alpha(w - w_0)$ along $-Dh_B(w_0 + u/\alpha)^T \nabla R(y)$ with $y = \alpha h_B(w)$ from `finite_jvp`, so
    that it keeps its digits at every alpha in float32; at alpha = inf it trains the tangent model. A step at a finite
    alpha costs about two of plain training: two evaluations of f more.

    The optimizer sees the true gradient $\nabla F_\alpha(w)$ and the parameters w, and its updates of w are added to
    u times alpha. So every optax optimizer takes the steps that it takes in w, up to the rounding of w: SGD, momentum
    and schedules are linear in the gradients, and the same in u and w with the same rates. Those that divide by the
    gradient's size (Adam) do not become lazy, since their steps in w do not shrink with alpha; weight decay pulls w
    to 0 and not to w0.

    Batches are drawn without replacement, in a new order every epoch; the samples that fill no batch are left out,
    others in every epoch.

    Args:
        f: Model f(w, x) with outputs (n,) or (n, k) for a batch x of any size.
        w0: Its parameters; any pytree, the floating arrays are the coordinates.
        x: Training inputs, samples first.
        y: Training targets: classes (n,) or real values of the outputs' shape.
        optimizer: Any optax optimizer. Schedules count steps, of which an epoch has n // batch_size
            (`inverse_time_decay` is the paper's).
        epochs: How often to go through the data.
        key: Random key of the orders and augmentations, shared by all lanes; or a vector (lanes,) of keys.
        batch_size: Samples in a batch, also of the test data.
        loss: "square" (classes become one-hot rows), "softmax", "logistic" (two classes), or a function of the
            targets of a batch to a loss, such as `lambda y: lj.square_loss(y, mean=False)`.
        alpha: Output scale in (0, inf], or a vector (lanes,) of them; inf needs an optimizer whose updates are
            proportional to the gradients.
        test: (x_test, y_test), for loss and accuracy after every epoch.
        throw: Raise after the epoch in which a lane diverged. False: go on with the other lanes; all measures of the
            diverged one are NaN from that epoch on, its `result` says so.
        options: What few trainings need, see `TrainingOptions`: augmentation, the plain difference, stacked starts,
            lanes side by side, a folder for checkpoints, a progress bar.

    Returns:
        `Training`.

    Raises:
        ValueError, TypeError: bad arguments, seen before any step is taken; a folder that holds something else.
        equinox.EquinoxRuntimeError: `throw`, and a loss or parameters became NaN or infinite.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.2 and supplement C.2.

    Example:
        >>> import jax.random as jr
        >>> from lazyjax.models import two_layer
        >>> x, w0 = jr.normal(jr.key(1), (32, 3)), two_layer().init(jr.key(0), d=3, width=8)
        >>> given = {"alpha": jnp.array([1.0, jnp.inf]), "epochs": 20, "batch_size": 8, "key": jr.key(2)}
        >>> training = train(two_layer(jnp.tanh), w0, x, x[:, 0], optax.sgd(0.1), **given)
        >>> training.loss.shape
        (2, 20)
        >>> bool((training.loss[:, -1] < 0.2 * training.loss[:, 0]).all())
        True
    """
    check_count("epochs", epochs)
    if not isinstance(options, TrainingOptions):
        msg = f"options must be a lazyjax.training.TrainingOptions, got {type(options).__name__}."
        raise TypeError(msg)
    lanes = make_lanes(alpha, key, w0, stacked=options.stacked)
    setup = make_setup(f, w0, x, y, optimizer, lanes, loss=loss, batch_size=batch_size, test=test, options=options)
    with contextlib.nullcontext() if options.folder is None else Checkpoints(options.folder) as checkpoints:
        chunk = options.chunk
        if chunk is None and checkpoints is not None:
            # As many as before, whatever is free now: in other groups the bits are others.
            chunk = checkpoints.found().get("chunk")
        run = _Run(setup, lanes, choose_size(setup, lanes, chunk, options.memory))
        if checkpoints is not None:
            checkpoints.claim(configuration(setup, lanes, run.chunk(0), run.states[0], loss))
            run.restore(checkpoints, int(epochs))
        run.check(throw)
        with tqdm(total=epochs, initial=run.epoch, unit="epoch", desc="train", disable=not options.progress) as bar:
            while run.epoch < epochs:
                run.advance()
                if checkpoints is not None:
                    checkpoints.store(run.epoch, run.saved)
                bar.set_postfix_str(run.describe())
                bar.update()
                run.check(throw)
    return run.finish()


class _Run:
    """A training under way: the states of its chunks of lanes, what was measured, and which lanes have diverged."""

    def __init__(self, setup: TrainingSetup, lanes: Lanes, size: int) -> None:
        self.setup, self.lanes = setup, lanes
        self.chunks = lanes.chunks(size)
        self.states = tuple(begin(setup, self.chunk(i)) for i in range(len(self.chunks)))
        self.history = {name: np.empty((0, lanes.count), lanes.alpha.dtype) for name in setup.measures}
        self.failed = np.zeros(lanes.count, bool)

    def chunk(self, i: int) -> Lanes:
        """Return the lanes of a chunk."""
        return pick_lanes(self.lanes, self.chunks[i])

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return len(self.history["loss"])

    @property
    def saved(self) -> tuple:
        """The content of a checkpoint."""
        return self.states, self.history, self.failed

    def restore(self, checkpoints: Checkpoints, epochs: int) -> None:
        """Go on from the checkpoint if there is one.

        Raises:
            ValueError: it has more epochs than the training is to have.
        """
        while (done := checkpoints.latest()) is not None:
            if done > epochs:
                msg = f"epochs must be at least the {done} that the checkpoint in folder has, got {epochs}."
                raise ValueError(msg)
            history = {name: np.empty((done, *rows.shape[1:]), rows.dtype) for name, rows in self.history.items()}
            found = checkpoints.load(done, (self.states, history, self.failed))
            if found is not None:
                self.states, self.history, self.failed = found
                return

    def advance(self) -> None:
        """Train all chunks for one more epoch; one whose lanes have all diverged rests."""
        states, failed = list(self.states), self.failed.copy()
        rows = {name: np.full((1, failed.size), np.nan, values.dtype) for name, values in self.history.items()}
        for i, index in enumerate(self.chunks):
            if self.failed[index].all():
                continue
            states[i], measures, finite = run_epoch(self.setup, self.chunk(i), states[i], self.epoch)
            failed[index] |= ~finite
            for name, values in measures.items():
                rows[name][0, index] = values
        # Whatever the numbers of a diverged lane are: outputs that are NaN still are right by chance.
        for row in rows.values():
            row[0, failed] = np.nan
        self.states, self.failed = tuple(states), failed
        self.history = {name: np.concatenate([self.history[name], row]) for name, row in rows.items()}

    def describe(self) -> str:
        """Return the last losses, for the progress bar."""
        fine = self.history["loss"][-1][~self.failed]
        text = "" if fine.size == 0 else f"loss {fine.min():.3g}" + (f" to {fine.max():.3g}" if fine.size > 1 else "")
        return text + (f", {int(self.failed.sum())} diverged" if self.failed.any() else "")

    def check(self, throw: bool) -> None:
        """Raise if a lane has diverged and that is asked for."""
        if not (throw and self.failed.any()):
            return
        alphas = [f"{float(a):g}" for a in np.asarray(self.lanes.alpha)[self.failed]]
        msg = (
            f"train diverged within {self.epoch} epochs at alpha = {', '.join(alphas)}: a loss or parameters became "
            "NaN or infinite; take a smaller learning rate, or throw=False to go on with other lanes."
        )
        raise eqx.EquinoxRuntimeError(msg)

    def finish(self) -> Training:
        """Return the result, the states of the chunks as those of the lanes."""
        single = self.lanes.single
        chunks = [self.chunk(i) for i in range(len(self.chunks))]
        params, displacement, alpha, result = _finish(
            self.setup, self.lanes, chunks, list(self.states), jnp.asarray(self.failed)
        )
        history = {name: jnp.asarray(rows[:, 0] if single else rows.T) for name, rows in self.history.items()}
        return Training(
            params=params,
            displacement=displacement,
            loss=history["loss"],
            accuracy=history.get("accuracy"),
            test_loss=history.get("test_loss"),
            test_accuracy=history.get("test_accuracy"),
            alpha=alpha,
            result=result,
            epochs=self.epoch,
        )


def trained_outputs(
    f: Model, w0: Params, training: Training, x: ArrayLike, *, batch_size: int = 128, difference: str = "exact"
) -> Array:
    r"""Return $\alpha h(w) = \alpha[f(w, x) - f(w_0, x)]$ after a training, on any inputs.

    Args:
        f: The model that was trained.
        w0: Its start, with lanes if it had them.
        training: From `train`.
        x: Inputs, samples first.
        batch_size: The number of samples that are evaluated at a time.
        difference: "exact": from the displacement, with its digits at every alpha. "plain": subtracted plainly at
            the final w, as a training with `difference="plain"` measures them, whatever primitives f has.

    Returns:
        (lanes?, n) or (lanes?, n, k).

    Raises:
        ValueError, TypeError: inputs unfit for f; a bad batch size or difference; a primitive without a rule.

    Source:
        Chizat, Oyallon, Bach (2019), section 3.2.

    Example:
        >>> import jax.random as jr
        >>> x, w0 = jnp.eye(3), jnp.zeros(3)
        >>> def f(w, x):
        ...     return x @ w
        >>> training = train(f, w0, x, jnp.ones(3), optax.sgd(3.0), epochs=1, batch_size=3, key=jr.key(0))
        >>> print(trained_outputs(f, w0, training, 2 * x))
        [2. 2. 2.]
    """
    check_count("batch_size", batch_size)
    check_difference(difference, training.alpha)
    coordinates, rest = split_params(w0)
    stacked = _is_stacked(coordinates, training)
    one = jtu.tree_map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[stacked:], leaf.dtype), coordinates)
    x, _ = check_inputs(f, eqx.combine(one, rest), x, "x")
    # By the plain difference w itself was trained, and by the other one u.
    plain = difference == "plain"
    end = eqx.filter(training.params, eqx.is_inexact_array) if plain else training.displacement
    given = {"rest": rest, "alpha": training.alpha, "ends": end, "x": x}
    static = {"stacked": stacked, "batch_size": int(batch_size), "plain": plain}
    parts = [
        [
            _outputs(f, coordinates, **given, **static, lane=jnp.asarray(lane), first=jnp.asarray(first))
            for first in range(0, x.shape[0], int(batch_size))
        ]
        for lane in range(training.alpha.size)
    ]
    return _join(parts, x.shape[0], training.alpha.ndim == 0)


def _is_stacked(coordinates: Params, training: Training) -> bool:
    """Return whether w0 has one start per lane of a training.

    Raises:
        ValueError: it is another start than that of the training.
    """
    shapes, moved = ([leaf.shape for leaf in jtu.tree_leaves(t)] for t in (coordinates, training.displacement))
    lanes = training.alpha.shape
    if lanes and shapes == moved:
        return True
    if [(*lanes, *shape) for shape in shapes] != moved:
        msg = f"w0 must be the start of the training, whose displacement has shapes {moved}, got shapes {shapes}."
        raise ValueError(msg)
    return False


@eqx.filter_jit
def _outputs(
    f: Model,
    coordinates: Params,
    *,
    rest: Params,
    alpha: Array,
    ends: Params,
    x: Array,
    lane: Array,
    first: Array,
    stacked: bool,
    batch_size: int,
    plain: bool,
) -> Array:
    """Return the outputs of one lane on a batch of x."""

    def of_lane(tree: Params) -> Params:
        return jtu.tree_map(lambda leaf: leaf[lane], tree)

    start = eqx.combine(of_lane(coordinates) if stacked else coordinates, rest)
    scale, end = of_lane((alpha, ends)) if alpha.ndim else (alpha, ends)
    return outputs_of(f, start, end, scale, x[batch_rows(first, batch_size, x.shape[0])], plain=plain)


@eqx.filter_jit
def _join(parts: list[list[Array]], n: int, single: bool) -> Array:
    """Return the outputs of all lanes from those of their batches, the last of which is filled up."""
    lanes = [jnp.concatenate(batches)[:n] for batches in parts]
    return lanes[0] if single else jnp.stack(lanes)


@eqx.filter_jit
def _finish(
    setup: TrainingSetup, lanes: Lanes, chunks: list[Lanes], states: list[State], failed: Array
) -> tuple[Params, Params, Array, Result]:
    """Return w, u, alpha and the result, with an axis of lanes unless there is a single one."""

    def end(lane: Lane, state: State) -> tuple[Params, Params]:
        return setup.coordinates(lane, state.position), setup.displacement(lane, state.position)

    def result(failed: Array) -> Result:
        where = RESULTS.where(failed, RESULTS.nonfinite, RESULTS.successful)  # pyright: ignore[reportArgumentType]
        return as_result(where)

    parts = [chunk.map(end, state) for chunk, state in zip(chunks, states, strict=True)]
    coordinates, displacement = jtu.tree_map(lambda *leaves: jnp.concatenate(leaves)[: lanes.count], *parts)
    found = (coordinates, displacement, lanes.alpha, jax.vmap(result)(failed))
    coordinates, displacement, alpha, result_ = jtu.tree_map(lambda leaf: leaf[0], found) if lanes.single else found
    return eqx.combine(coordinates, setup.rest), displacement, alpha, result_
