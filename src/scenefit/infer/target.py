"""The posterior density of few parameters, in coordinates in which it is nearly a unit normal."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scenefit.arrays.compilation import as_booleans, as_floats, compiled
from scenefit.infer.dense import Coordinates, hessian
from scenefit.infer.problem import Problem, State, smooth_range

NEWTON_STEPS = 3
"""Newton steps from the mode of the parameters' density to that of the coordinates'."""


class Target(eqx.Module):
    """Log-density of the free coordinates of a problem.

    Parameters have the density of their priors, flat where there is none, over the range that their constraints leave.
    Coordinates kept within bounds (fluxes, amplitudes) become `low + s softplus((u - low) / s)` of free ones u, which differ
    from them only within a few widths s of the bound.

    Attributes
    ----------
    problem : Problem
    state : State
        Values of all that isn't free.
    index : array of int, shape (m,)
        The free coordinates.
    own : array of bool, shape (e,)
        Elements that count in the volume of the parameters: free and not tied to another.
    softness : array, shape (m,)
        The widths s; 0 without bounds.
    center : array, shape (m,)
    root : array, shape (m, m)
        Whitened coordinates z stand for `u = center + root z`.
    """

    problem: Problem
    state: State
    index: Int[Array, " m"]
    own: Bool[Array, " e"]
    softness: Float[Array, " m"]
    center: Float[Array, " m"]
    root: Float[Array, "m m"]

    def vector(self, free: Float[Array, " m"]) -> Float[Array, " n"]:
        """Return the problem's coordinates from free ones u."""
        return self.state.vector.at[self.index].set(_bounded(free, *self._bounds(), self.softness))

    def unwhitened(self, white: Float[Array, " m"]) -> Float[Array, " m"]:
        """Return the free coordinates u from whitened ones."""
        return self.center + self.root @ white

    def log_density(self, free: Float[Array, " m"]) -> Float[Array, ""]:
        """Return the log-density of u, up to a constant that doesn't depend on the parameters."""
        vector = self.vector(free)
        low, high = self._bounds()
        ones = jnp.ones_like(free)
        steepness = jax.jvp(lambda u: _bounded(u, low, high, self.softness), (free,), (ones,))[1]
        loss = self.problem.loss(State(vector, self.state.images))
        return -loss + self._log_volume(vector) + jnp.sum(jnp.log(steepness))

    def potential(self, white: Float[Array, " m"]) -> Float[Array, ""]:
        """Return minus the log-density of the whitened coordinates."""
        return -self.log_density(self.unwhitened(white))

    def elements(self, white: Float[Array, " m"]) -> Float[Array, " e"]:
        """Return the values of all parameters."""
        return self.problem.elements(self.vector(self.unwhitened(white)))

    def _bounds(self):
        return self.problem.lowest.vector[self.index], self.problem.highest.vector[self.index]

    def _log_volume(self, vector):
        """Return the logarithm of the derivative of the parameters with respect to the problem's coordinates."""
        coordinate, total = vector[self.problem.index], jnp.zeros((), vector.dtype)
        for leaf in self.problem.leaves:
            part = slice(leaf.start, leaf.stop)
            own = self.own[part]
            if leaf.map == "range":
                low, high = self.problem.low[part], self.problem.high[part]
                ones = jnp.ones_like(coordinate[part])
                slope = jax.jvp(lambda c, a=low, b=high: smooth_range(c, a, b), (coordinate[part],), (ones,))[1]
                total += jnp.sum(jnp.where(own, jnp.log(jnp.abs(jnp.where(own, slope, 1.0))), 0.0))
            elif leaf.map == "disk":
                pairs = coordinate[part].reshape(-1, 2)
                total -= 2 * jnp.sum(jnp.where(own.reshape(-1, 2)[:, 0], jnp.log1p(jnp.sum(pairs**2, axis=1)), 0.0))
        return total


def _bounded(free, low, high, softness):
    """Return values within bounds from free ones: above the lower bound, or below the upper one, softly."""
    safe = jnp.where(softness > 0, softness, 1.0)
    above, below = jnp.where(jnp.isfinite(low), low, 0.0), jnp.where(jnp.isfinite(high), high, 0.0)
    raised = above + safe * jax.nn.softplus((free - above) / safe)
    lowered = below - safe * jax.nn.softplus((below - free) / safe)
    return jnp.where(softness > 0, jnp.where(jnp.isfinite(low), raised, lowered), free)


def laplace_target(problem: Problem, state: State, coordinates: Coordinates) -> Target:
    """Return the density about its mode, near a state, whitened by the inverse root of its Hessian there.

    The Hessian is the exact one; directions in which it isn't positive take that of Gauss and Newton.

    Raises
    ------
    ValueError
        If nothing determines a combination of the parameters.
    """
    gauss_newton = np.asarray(_gauss_newton(problem, state, coordinates), dtype=float)
    index = np.asarray(coordinates.index)
    scale = _checked_scale(gauss_newton)
    sigma = np.sqrt(np.diag(_inverse(gauss_newton, scale)))
    low, high = (np.asarray(bound.vector, float)[index] for bound in (problem.lowest, problem.highest))
    value = np.asarray(state.vector, dtype=float)[index]
    is_bounded = np.isfinite(low) | np.isfinite(high)
    softness = np.where(is_bounded, sigma, 0.0)
    free = _free_value(value, low, high, softness)
    elements = np.asarray(problem.index)
    own = (elements == np.arange(len(elements))) & np.asarray(problem.free.vector)[elements]
    target = Target(
        problem=problem,
        state=state,
        index=coordinates.index,
        own=as_booleans(own),
        softness=as_floats(softness),
        center=as_floats(free),
        root=as_floats(np.diag(sigma)),
    )
    best, curvature = _newton(target, gauss_newton)
    root = np.linalg.inv(np.linalg.cholesky(curvature)).T
    return eqx.tree_at(lambda t: (t.center, t.root), target, (as_floats(best), as_floats(root)))


@compiled
def _gauss_newton(problem, state, coordinates):
    return hessian(problem, state, coordinates)[1]


@compiled
def _derivatives(target: Target, free):
    """Return value, gradient and Hessian of minus the log-density."""

    def negative(u):
        return -target.log_density(u)

    value, gradient = jax.value_and_grad(negative)(free)
    rows = jax.lax.map(lambda e: jax.jvp(jax.grad(negative), (free,), (e,))[1], jnp.eye(len(free), dtype=free.dtype))
    return value, gradient, rows


def _newton(target: Target, gauss_newton: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mode in free coordinates and the Hessian there."""
    free, best = np.asarray(target.center, dtype=float), None
    for _ in range(NEWTON_STEPS):
        value, gradient, matrix = (np.asarray(part, dtype=float) for part in _derivatives(target, as_floats(free)))
        if not np.isfinite(value) or (best is not None and value > best[0] + 0.1):
            break
        curvature = _positive(0.5 * (matrix + matrix.T), gauss_newton)
        best = value, free, curvature
        step = -np.linalg.solve(curvature, gradient)
        if np.sqrt(step @ curvature @ step) < 0.05 * np.sqrt(len(step)):
            best = value, free + step, curvature
            break
        free = free + step
    if best is None:
        raise ValueError("The posterior density isn't finite at the result of the fit.")
    return best[1], best[2]


def _positive(matrix: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """Return a Hessian with the curvature of the fallback in directions in which it is less than a twentieth of that."""
    lower = np.linalg.cholesky(_regular(fallback))
    inverse = np.linalg.inv(lower)
    values, vectors = np.linalg.eigh(inverse @ matrix @ inverse.T)
    values = np.where(values > 0.05, values, 1.0)
    return lower @ ((vectors * values) @ vectors.T) @ lower.T


def _regular(matrix):
    """Return the matrix with a hair more on its diagonal."""
    return matrix + np.diag(1e-7 * np.diag(matrix))


def _inverse(matrix, scale):
    """Return the inverse of a positive matrix, scaled to unit diagonal first."""
    return np.linalg.inv(_regular(matrix * scale[:, None] * scale)) * scale[:, None] * scale


def _checked_scale(matrix: np.ndarray) -> np.ndarray:
    """Return what scales a Hessian to unit diagonal."""
    diagonal = np.diag(matrix)
    if not (np.isfinite(diagonal) & (diagonal > 0)).all():
        raise ValueError(
            f"{int((~(diagonal > 0)).sum())} of {len(diagonal)} free coordinates don't change the posterior density: fix them, "
            "or give them a prior."
        )
    return 1 / np.sqrt(diagonal)


def _free_value(value, low, high, softness) -> np.ndarray:
    """Return what `_bounded` maps to a value; not further than two widths beyond a bound."""
    distance = np.where(np.isfinite(low), value - low, np.where(np.isfinite(high), high - value, 1.0))
    ratio = np.maximum(distance / np.where(softness > 0, softness, 1.0), 0.127)
    # The inverse of softplus; 0.127 is softplus(-2).
    moved = np.where(ratio > 30, ratio, np.log(np.expm1(np.minimum(ratio, 30)))) * softness
    bounded = np.where(np.isfinite(low), low + moved, high - moved)
    return np.where(softness > 0, bounded, value)
