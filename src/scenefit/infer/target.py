"""The posterior density of few parameters, in coordinates in which it is nearly a unit normal."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from scenefit.arrays.compilation import as_booleans, as_floats, compiled
from scenefit.infer.dense import coordinate_maps, hessian
from scenefit.infer.footprints import Footprints
from scenefit.infer.inverse import covariance_of, undetermined_names
from scenefit.infer.posterior import Layout
from scenefit.infer.problem import AMPLITUDES, Problem, State, smooth_range

NEWTON_STEPS, LONGEST_STEP, SMALL_STEP, UPHILL = 6, 1.0, 0.05, 0.05
"""Newton steps at most from the mode of the parameters' density to that of the coordinates', and their lengths (root mean square
in standard deviations): at most, and at the end; a step is shortened if it raises minus the log-density by more than the last."""
DIFFERENCE, SMALLEST_CURVATURE = 0.3, 0.05
"""Standard deviations over which gradients are differenced, and the curvature in these units below which it isn't believed."""


LARGEST_SPREAD = 0.5
"""Amplitudes are fractions: their standard deviations can't be larger, however alike neighbouring rings look."""


SATURATED_SPREAD = 1.5
"""Of a logarithm or a logit that the data don't determine."""


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
    low, high : arrays, shape (m,)
        Bounds of the coordinates that keep their own values.
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
    low: Float[Array, " m"]
    high: Float[Array, " m"]
    softness: Float[Array, " m"]
    center: Float[Array, " m"]
    root: Float[Array, "m m"]

    def vector(self, free: Float[Array, " m"]) -> Float[Array, " n"]:
        """Return the problem's coordinates from free ones u."""
        return self.state.vector.at[self.index].set(_bounded(free, self.low, self.high, self.softness))

    def unwhitened(self, white: Float[Array, " m"]) -> Float[Array, " m"]:
        """Return the free coordinates u from whitened ones."""
        return self.center + self.root @ white

    def log_density(self, free: Float[Array, " m"]) -> Float[Array, ""]:
        """Return the log-density of u, up to a constant that doesn't depend on the parameters."""
        vector = self.vector(free)
        low, high = self.low, self.high
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

    def _log_volume(self, vector):
        """Return the logarithm of the derivative of the parameters with respect to the problem's coordinates."""
        problem, coordinate = self.problem, vector[self.problem.index]
        is_ranged, is_disk, other = problem.maps()
        is_ranged = is_ranged & self.own
        ones = jnp.ones_like(coordinate)
        slope = jax.jvp(lambda at: smooth_range(at, problem.low, problem.high), (coordinate,), (ones,))[1]
        total = jnp.sum(jnp.where(is_ranged, jnp.log(jnp.abs(jnp.where(is_ranged, slope, 1.0))), 0.0))
        # The determinant of a pair's map, half of its logarithm from each of the two.
        square = coordinate**2 + coordinate[other] ** 2
        return total - jnp.sum(jnp.where(is_disk & self.own, jnp.log1p(square), 0.0))


def _bounded(free, low, high, softness):
    """Return values within bounds from free ones: above the lower bound, or below the upper one, softly."""
    safe = jnp.where(softness > 0, softness, 1.0)
    above, below = jnp.where(jnp.isfinite(low), low, 0.0), jnp.where(jnp.isfinite(high), high, 0.0)
    raised = above + safe * jax.nn.softplus((free - above) / safe)
    lowered = below - safe * jax.nn.softplus((below - free) / safe)
    return jnp.where(softness > 0, jnp.where(jnp.isfinite(low), raised, lowered), free)


def laplace_target(problem: Problem, state: State, layout: Layout, where: Footprints) -> Target:
    """Return the density about its mode, near a state, whitened by the inverse root of its Hessian there.

    Directions in which that isn't positive take the Hessian of Gauss and Newton.

    Raises
    ------
    ValueError
        If nothing determines a combination of the parameters.
    """
    gauss_newton = np.array(_gauss_newton(problem, state, where), dtype=float)
    index = np.asarray(where.index)
    gauss_newton += np.diag(_of_amplitudes(problem)[index] / LARGEST_SPREAD**2)
    # Where a map saturates, the data say nothing, but the density of the coordinate falls off like its volume.
    gauss_newton += np.diag((coordinate_maps(problem)[index] != "identity") / SATURATED_SPREAD**2)
    covariance = covariance_of(gauss_newton)
    sigma = np.sqrt(np.diag(covariance))
    if not np.isfinite(sigma).all():
        _raise_undetermined(problem, layout, index, gauss_newton)
    mapped = coordinate_maps(problem)[index] != "identity"
    low = np.where(mapped, -np.inf, np.asarray(problem.lowest.vector, float)[index])
    high = np.where(mapped, np.inf, np.asarray(problem.highest.vector, float)[index])
    value = np.asarray(state.vector, dtype=float)[index]
    is_bounded = np.isfinite(low) | np.isfinite(high)
    softness = np.where(is_bounded, sigma, 0.0)
    free = _free_value(value, low, high, softness)
    elements = np.asarray(problem.index)
    own = (elements == np.arange(len(elements))) & np.asarray(problem.free.vector)[elements]
    root = np.linalg.cholesky(covariance)
    target = Target(
        problem=problem,
        state=state,
        index=where.index,
        own=as_booleans(own),
        low=as_floats(low),
        high=as_floats(high),
        softness=as_floats(softness),
        center=as_floats(free),
        root=as_floats(root),
    )
    return _at_mode(target)


@compiled
def _gauss_newton(problem, state, where):
    return hessian(problem, state, where)


@compiled
def _slopes(target: Target, white):
    """Return minus the log-density and its gradient at whitened coordinates, shape (k, m)."""
    return lax.map(jax.value_and_grad(target.potential), white)


def _at_mode(target: Target) -> Target:
    """Return the target about its mode, whitened by its Hessian there.

    The Hessian is that of differences of the gradient over `DIFFERENCE` standard deviations either way: exact enough, in single
    precision too, and quicker to compile than second derivatives.
    """
    size = len(target.center)
    ends = np.concatenate([np.zeros((1, size)), DIFFERENCE * np.eye(size), -DIFFERENCE * np.eye(size)])
    known, part = None, 1.0
    for _ in range(NEWTON_STEPS):
        values, slopes = (np.asarray(each, dtype=float) for each in _slopes(target, as_floats(ends)))
        finite = np.isfinite(values).all() and np.isfinite(slopes).all()
        if known is None and not finite:
            raise ValueError("The posterior density isn't finite about the result of the fit.")
        if known is not None and not (finite and values[0] < known.potential + UPHILL):
            part *= 0.25
            target = _about(target, known.center + part * known.move, known.root)
            continue
        matrix = (slopes[1 : size + 1] - slopes[size + 1 :]) / (2 * DIFFERENCE)
        curvature, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
        # Directions in which the density isn't peaked keep the curvature of Gauss and Newton.
        curvature = np.where(curvature > SMALLEST_CURVATURE, curvature, 1.0)
        step = -vectors @ (vectors.T @ slopes[0] / curvature)
        length = np.sqrt(np.mean(step**2))
        step = step * min(1.0, LONGEST_STEP / max(length, 1e-30))
        root, center = np.asarray(target.root, dtype=float), np.asarray(target.center, dtype=float)
        known, part = _Newton(center, root @ (vectors / np.sqrt(curvature)), root @ step, values[0]), 1.0
        target = _about(target, center + known.move, known.root)
        if length < SMALL_STEP:
            return target
    # Where the last step led has not been seen.
    return target if known is None else _about(target, known.center, known.root)


class _Newton(NamedTuple):
    """A center whose density and Hessian are known, and the step from there to the mode."""

    center: np.ndarray
    root: np.ndarray
    move: np.ndarray
    potential: float


def _about(target: Target, center: np.ndarray, root: np.ndarray) -> Target:
    """Return the target about another center, whitened by another root."""
    return eqx.tree_at(lambda t: (t.center, t.root), target, (as_floats(center), as_floats(root)))


def _of_amplitudes(problem: Problem) -> np.ndarray:
    """Return which coordinates are amplitudes."""
    result = np.zeros(len(problem.lowest.vector), bool)
    for leaf in problem.leaves:
        if leaf.name == AMPLITUDES:
            result[leaf.start : leaf.stop] = True
    return result


def _raise_undetermined(problem, layout, index, information):
    """Raise ValueError that names what nothing determines."""
    groups = undetermined_names(problem, layout, index, information)
    raise ValueError(
        "Neither the data nor a prior determine the combination of "
        + "; nor that of ".join(groups)
        + ": fix some of them, "
        "or give them priors."
    )


def _free_value(value, low, high, softness) -> np.ndarray:
    """Return what `_bounded` maps to a value; not further than two widths beyond a bound."""
    distance = np.where(np.isfinite(low), value - low, np.where(np.isfinite(high), high - value, 1.0))
    ratio = np.maximum(distance / np.where(softness > 0, softness, 1.0), 0.127)
    # The inverse of softplus; 0.127 is softplus(-2).
    moved = np.where(ratio > 30, ratio, np.log(np.expm1(np.minimum(ratio, 30)))) * softness
    bounded = np.where(np.isfinite(low), low + moved, high - moved)
    return np.where(softness > 0, bounded, value)
