"""Flows of two-layer ReLU nets, mode by mode through sliding, with NumPy and SciPy: a reference for `ThroughKinks`.

f(x) = sum_j a_j max(b_j.x, 0), the square loss of a mean, alpha = 1. Each pair (sample, unit) is off, on, or slides;
between two changes DOP853 follows the smooth flow, and each change is located. Slow on purpose.
"""

import itertools

import numpy as np
from scipy.integrate import DOP853
from scipy.optimize import brentq

OFF, ON, SLIDING = 0, 1, 2


def problem(seed, n=15, d=2, m=20, tau=0.1):
    """Return inputs and outputs of a teacher of three units on the sphere, and a symmetrized start (b, a)."""
    rng = np.random.default_rng(seed)

    def sphere(rows):
        x = rng.normal(size=(rows, d))
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    teacher, signs = sphere(3), np.sign(rng.normal(size=3))
    x = sphere(n)
    b, a = rng.normal(size=(m // 2, d)), rng.normal(size=m // 2)
    return x, np.maximum(x @ teacher.T, 0) @ signs, tau * np.concatenate([b, b]), tau * np.concatenate([a, -a])


class Reference:
    def __init__(self, x, y, m):
        self.x, self.y, self.m, (self.n, self.d) = x, y, m, x.shape

    def unpack(self, w):
        return w[: self.m * self.d].reshape(self.m, self.d), w[self.m * self.d :]

    def look(self, w, modes):
        """Return w' and the margins of all pairs: negative where one has to change its mode."""
        b, a = self.unpack(w)
        z = self.x @ b.T
        hidden = np.where(modes == ON, z, 0)
        r = hidden @ a - self.y
        gates = (modes == ON).astype(float)
        for j in np.where((modes == SLIDING).any(axis=0))[0]:
            i = np.where(modes[:, j] == SLIDING)[0]
            push = -self.x[i] @ ((gates[:, j] * r) @ self.x)
            gates[i, j] = np.linalg.lstsq(self.x[i] @ self.x[i].T * r[i], push, rcond=1e-12)[0]
        slope = -(a[:, None] / self.n) * ((gates * r[:, None]).T @ self.x)
        inside = np.minimum(gates, 1 - gates)
        margins = np.where(modes == SLIDING, inside, np.where(modes == ON, z, -z))
        return np.concatenate([slope.ravel(), -(hidden.T @ r) / self.n]), margins, gates

    def change(self, w, modes):
        """Change the mode of the pair that has to."""
        _, margins, gates = self.look(w, modes)
        i, j = np.unravel_index(np.argmin(margins), margins.shape)
        if modes[i, j] == SLIDING:
            modes[i, j] = ON if gates[i, j] > 0.5 else OFF
        else:
            other = OFF if modes[i, j] == ON else ON
            modes[i, j] = other
            speed = self.x[i] @ self.unpack(self.look(w, modes)[0])[0][j]
            modes[i, j] = other if (speed > 0) == (other == ON) else SLIDING
        unit = w[j * self.d : (j + 1) * self.d]
        side = {OFF: -1e-14, ON: 1e-14, SLIDING: 0.0}[modes[i, j]]
        unit += self.x[i] * (side - self.x[i] @ unit) / (self.x[i] @ self.x[i])

    def run(self, b, a, ts, rtol=1e-10):
        """Return w at ts, and how often a pair began to slide."""
        w, modes, slides = np.concatenate([b.ravel(), a]), (self.x @ b.T > 0).astype(int), 0
        states = [w.copy()]
        for start, end in itertools.pairwise(ts):
            t = start
            while t < end:
                solver = DOP853(lambda _, v: self.look(v, modes)[0], t, w, end, rtol=rtol, atol=rtol / 100)
                while solver.status == "running":
                    solver.step()
                    t, w = solver.t, solver.y.copy()
                    if self.look(w, modes)[1].min() < -1e-12:
                        dense = solver.dense_output()
                        least = lambda s, dense=dense: self.look(dense(s), modes)[1].min() + 1e-13
                        early = least(solver.t_old) < 0
                        t = solver.t_old if early else brentq(least, solver.t_old, solver.t, xtol=1e-14, rtol=1e-15)
                        w = dense(t).copy()
                        before = (modes == SLIDING).sum()
                        self.change(w, modes)
                        slides += (modes == SLIDING).sum() > before
                        break
            states.append(w.copy())
        return np.stack(states), slides
