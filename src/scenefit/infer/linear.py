"""What the model is linear in, given its shapes: fluxes of Gaussian rings and of all else, backgrounds; and their density.

A `MultiGaussianMorphology` of flux F and amplitudes a is linear in the ring fluxes w = F a. All else that is free (centres,
ellipticities, sizes, shifts) is replaced by its derivatives at the fit, so that its errors count, too.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy.special import log_ndtr

from scenefit.arrays.compilation import as_floats, as_integers, compiled
from scenefit.infer.fit import FitResult, linear_coordinates
from scenefit.infer.posterior import Layout
from scenefit.infer.problem import Problem, State
from scenefit.infer.rings import Rings, ring_columns
from scenefit.infer.truncated import TruncatedDensity
from scenefit.model.parameters import Parameter

MAX_COLUMNS = 400
"""Numbers that a density may have."""
BATCH, CHUNK = 16, 65536
"""Columns of the design that are rendered, and pixels that are multiplied, at a time."""


class LinearModel(eqx.Module):
    """Density of the numbers that the model is linear in.

    Attributes
    ----------
    density : TruncatedDensity
        Of the numbers that the data or a prior determine.
    known : array of bool, shape (m,)
        Which of the numbers these are; the others stay as they are.
    rings : tuple of Rings
        What the first numbers are.
    others : array of int
        Coordinates that are the remaining ones.
    start : array, shape (m,)
        The numbers of the fit.
    likelihood : tuple of arrays, shapes (m,) and (m, m)
        Gradient and negative second derivative of the log-likelihood there.
    vector : array, shape (n,)
        The coordinates of the fit.
    low, high : arrays, shape (n,)
        Bounds of the coordinates.
    is_exact : bool
        Whether nothing is replaced by derivatives.
    is_proper : bool
        Whether all amplitudes have priors.
    """

    density: TruncatedDensity
    known: np.ndarray
    rings: tuple[Rings, ...]
    others: np.ndarray
    start: np.ndarray
    likelihood: tuple[np.ndarray, np.ndarray]
    vector: np.ndarray
    low: np.ndarray
    high: np.ndarray
    is_exact: bool
    is_proper: bool

    def log_likelihood(self, draws: np.ndarray) -> np.ndarray:
        """Return the log-likelihood, relative to that of the fit, of draws of the known numbers, shape (..., m)."""
        step, (gradient, curvature) = draws - self.start[self.known], self.likelihood
        curvature = curvature[self.known][:, self.known]
        return step @ gradient[self.known] - 0.5 * np.einsum("...i,ij,...j->...", step, curvature, step)

    def vectors(self, draws: np.ndarray) -> np.ndarray:
        """Return the problem's coordinates, shape (..., n), from draws of the known numbers."""
        numbers = np.broadcast_to(self.start, (*draws.shape[:-1], len(self.start))).copy()
        numbers[..., self.known] = draws
        result = np.broadcast_to(self.vector, (*draws.shape[:-1], len(self.vector))).copy()
        place = 0
        for rings in self.rings:
            rings.insert(result, numbers[..., place : place + len(rings)])
            place += len(rings)
        result[..., self.others] = np.clip(numbers[..., place:], self.low[self.others], self.high[self.others])
        return result


def linear_model(problem: Problem, state: State, layout: Layout, result: FitResult) -> LinearModel:
    """Return the linear model about a fit.

    Raises
    ------
    ValueError
        If the noise isn't Gaussian or has free parameters, there are free images or too many numbers, amplitudes or fluxes of
        rings are tied, amplitudes are linked otherwise than by `link.PerBand`, or a prior isn't of a kind that leaves the
        density normal, or a mixture of normal ones.
    """
    _check(problem, result)
    index, vector = np.asarray(problem.index), np.asarray(state.vector, dtype=float)
    rings, columns = ring_columns(problem, layout, result, vector)
    used = np.concatenate([np.concatenate([each.amplitudes, each.fluxes]) for each in rings] or [np.zeros(0, int)])
    free = np.asarray(problem.free.vector)
    others = np.setdiff1d(np.unique(index)[free[np.unique(index)]], used)
    start = np.concatenate([*(each.start for each in rings), vector[others]])
    if not 0 < len(start) <= MAX_COLUMNS:
        raise ValueError(f"Linear sampling wants 1 to {MAX_COLUMNS} free numbers; there are {len(start)}: fix some.")
    points = [point for point, _, _ in columns] + [vector] * len(others)
    raw, residual_square, slope = _normal_equations(problem, state, points, [d for *_, d in columns] + list(others))
    mix = np.zeros((len(points), len(start)))
    for row, (_, weights, _) in enumerate(columns):
        mix[row, list(weights)] = list(weights.values())
    mix[len(columns) :, len(start) - len(others) :] = np.eye(len(others))
    information, slope = mix.T @ raw @ mix, mix.T @ slope
    terms = _Terms(start, information, slope, -0.5 * residual_square)
    is_linear = np.isin(others, _linear_coordinates(problem))
    _add_curved_priors(terms, problem, state, layout, result, others, is_linear)
    is_proper = _add_linear_priors(terms, problem, layout, result, rings, others)
    low = np.concatenate([*(np.zeros(len(each)) for each in rings), np.full(len(others), -np.inf)])
    low[len(low) - len(others) :][is_linear] = np.asarray(problem.lowest.vector, dtype=float)[others[is_linear]]
    known = (np.diag(terms.precision) > 0) | np.isfinite(terms.cauchy_scale)
    return LinearModel(
        density=terms.density(low, known),
        known=known,
        rings=tuple(rings),
        others=others,
        start=start,
        likelihood=(-slope, information),
        vector=vector,
        low=np.asarray(problem.lowest.vector, dtype=float),
        high=np.asarray(problem.highest.vector, dtype=float),
        is_exact=bool(is_linear.all()) and all(len(each.fluxes) == 1 for each in rings),
        is_proper=is_proper,
    )


@compiled
def data_losses(problem: Problem, state: State, vectors):
    """Return half the chi-square at vectors of coordinates, shape (k, n), relative to that of the state."""
    first = problem.residuals(state)[0]

    def one(vector):
        parts = zip(problem.residuals(State(vector, state.images))[0], first, strict=True)
        # The difference of squares keeps its digits.
        return 0.5 * sum(jnp.vdot(now - before, now + before) for now, before in parts)

    return jax.lax.map(one, vectors)


class _Terms:
    """Collects the terms of a density: quadratic ones about the fit, and half-Cauchy priors."""

    def __init__(self, start, information, slope, constant):
        self.start, self.precision = start, information.copy()
        # As a function of the numbers themselves, not of their distance from the fit.
        self.shift = information @ start - slope
        self.constant = constant + slope @ start - 0.5 * start @ information @ start
        self.cauchy_scale = np.full(len(start), np.inf)

    def add_normal(self, row: np.ndarray, mean: float, scale: float):
        """Add a normal density of `row . x`."""
        self.precision = self.precision + np.outer(row, row) / scale**2
        self.shift = self.shift + row * mean / scale**2
        self.constant += -0.5 * (mean / scale) ** 2 - np.log(scale * np.sqrt(2 * np.pi))

    def add(self, number: int, prior: dist.Distribution | None, unit: float, low: float, path: str):
        """Add the prior of `unit` times a number that is above `low`."""
        row = np.zeros(len(self.start))
        row[number] = 1.0
        if prior is None:
            return
        if low == 0 and isinstance(prior, dist.HalfCauchy):
            self.cauchy_scale[number] = float(np.asarray(prior.scale)) / unit
        elif low == 0 and isinstance(prior, dist.HalfNormal):
            self.add_normal(row, 0.0, float(np.asarray(prior.scale)) / unit)
            self.constant += np.log(2)
        elif low == 0 and isinstance(prior, dist.Exponential):
            rate = float(np.asarray(prior.rate)) * unit
            self.shift = self.shift - rate * row
            self.constant += np.log(rate)
        else:
            mean, scale, log_mass = _normal(prior, low * unit, path)
            self.add_normal(row, mean / unit, scale / unit)
            self.constant -= log_mass

    def add_quadratic(self, numbers: np.ndarray, value: float, gradient: np.ndarray, curvature: np.ndarray):
        """Add the logarithm of a density: its value, gradient and negative second derivative at the fit."""
        start = self.start[numbers]
        self.precision[np.ix_(numbers, numbers)] += curvature
        self.shift[numbers] += gradient + curvature @ start
        self.constant += value - gradient @ start - 0.5 * start @ curvature @ start

    def density(self, low: np.ndarray, known: np.ndarray) -> TruncatedDensity:
        """Return the density of the numbers that are known; the others keep their values."""
        fixed = self.start[~known]
        precision = self.precision[known][:, known]
        return TruncatedDensity(
            0.5 * (precision + precision.T),
            self.shift[known] - self.precision[known][:, ~known] @ fixed,
            low[known],
            self.cauchy_scale[known],
            float(self.constant + self.shift[~known] @ fixed - 0.5 * fixed @ self.precision[~known][:, ~known] @ fixed),
        )


def _check(problem: Problem, result: FitResult):
    """Raise ValueError if the noise isn't Gaussian, or images are free."""
    pairs = list(zip(result.observations, problem.images, strict=True))
    if wrong := [obs.name for obs, image in pairs if not image.noise.is_gaussian]:
        raise ValueError(
            f"Linear sampling wants Gaussian noise; that of {', '.join(wrong)} isn't. Use method='nuts' or 'laplace'."
        )
    if wrong := [p.path for p in result.parameters if p.free and ".noise." in p.path]:
        raise ValueError(f"Linear sampling wants noise that is known: fix {', '.join(wrong)}, and fit again.")
    if any(np.any(image) for image in problem.free.images):
        raise ValueError("Linear sampling wants no free image: fix those of the scene, and fit again.")
    numbers = _linear_coordinates(problem)
    numbers = numbers[np.asarray(problem.free.vector)[numbers]]
    if np.isfinite(np.asarray(problem.highest.vector)[numbers]).any():
        raise ValueError(
            "Linear sampling wants fluxes and backgrounds without an upper bound: constrain them otherwise."
        )


def _linear_coordinates(problem: Problem) -> np.ndarray:
    """Return the coordinates of fluxes and backgrounds."""
    return np.unique(np.asarray(problem.index)[linear_coordinates(problem)])


def _normal_equations(problem, state, points, directions) -> tuple[np.ndarray, float, np.ndarray]:
    """Return products of the columns with one another, of the residuals of the fit with themselves, and of columns with those."""
    residuals = [np.asarray(each).ravel() for each in jax.device_get(_residuals(problem, state))]
    columns = []
    for first in range(0, len(points), BATCH):
        chosen = np.minimum(np.arange(first, first + BATCH), len(points) - 1)
        vectors, numbers = np.stack([points[n] for n in chosen]), np.array([directions[n] for n in chosen])
        columns.append(jax.device_get(_derivatives(problem, state, as_floats(vectors), as_integers(numbers))))
    product, slope = np.zeros((len(points), len(points))), np.zeros(len(points))
    for number, residual in enumerate(residuals):
        planes = [np.asarray(batch[number]).reshape(BATCH, -1) for batch in columns]
        for start in range(0, len(residual), CHUNK):
            part = np.concatenate([plane[:, start : start + CHUNK] for plane in planes])[: len(points)].astype(float)
            product += part @ part.T
            slope += part @ residual[start : start + CHUNK].astype(float)
    return product, float(sum((each.astype(float) ** 2).sum() for each in residuals)), slope


@compiled
def _residuals(problem: Problem, state: State):
    return problem.residuals(state)[0]


@compiled
def _derivatives(problem: Problem, state: State, vectors, numbers):
    """Return derivatives of the residuals at vectors of coordinates, each along a coordinate."""

    def one(row):
        vector, number = row
        direction = jnp.zeros_like(vector).at[number].set(1.0)
        return jax.jvp(lambda at: problem.residuals(State(at, state.images))[0], (vector,), (direction,))[1]

    return jax.lax.map(one, (vectors, numbers))


def _add_curved_priors(terms: _Terms, problem, state, layout, result, others, is_linear):
    """Add the priors of what isn't linear, by their second derivatives as far as these are positive."""
    numbers = np.flatnonzero(~is_linear) + len(terms.start) - len(others)
    if not problem.priors or not len(numbers):
        return
    chosen = others[~is_linear]
    gradient, curvature = (np.asarray(each, dtype=float) for each in _prior_derivatives(problem, state.vector))
    values, vectors = np.linalg.eigh(curvature[np.ix_(chosen, chosen)])
    index, elements = np.asarray(problem.index), np.asarray(_elements(problem, state.vector), dtype=float)
    value = 0.0
    for _, prior, places, units in _priors(layout, result):
        if np.isin(index[places], chosen).any():
            value += float(np.sum(np.asarray(prior.log_prob(elements[places] * units))))
    terms.add_quadratic(numbers, value, gradient[chosen], (vectors * np.maximum(values, 0.0)) @ vectors.T)


@compiled
def _prior_derivatives(problem: Problem, vector):
    """Return gradient and negative second derivatives of the log-prior."""
    return jax.grad(problem.log_prior)(vector), -jax.jacfwd(jax.grad(problem.log_prior))(vector)


@compiled
def _elements(problem: Problem, vector):
    return problem.elements(vector)


def _priors(layout: Layout, result: FitResult):
    """Yield path, prior, elements and units of all parameters with priors."""
    for path, (places, units) in layout.places.items():
        if (prior := result.parameters.table[path].prior) is not None:
            yield path, prior, places, units


def _add_linear_priors(terms: _Terms, problem, layout, result, rings, others) -> bool:
    """Add the priors of rings, fluxes and backgrounds; return whether all amplitudes have one."""
    index, lowest, is_proper, place = np.asarray(problem.index), np.asarray(problem.lowest.vector), True, 0
    table = result.parameters.table
    for group in rings:
        prior = table[f"{group.path}.morphology.amplitudes"].prior
        _add_amplitude_priors(terms, prior, group, place, table[f"{group.path}.morphology.amplitudes"])
        flux = table[f"{group.path}.spectrum.flux"]
        _add_total_priors(terms, flux, group, place, layout.places[flux.path][1])
        is_proper &= prior is not None
        place += len(group)
    number = {int(coordinate): place + n for n, coordinate in enumerate(others)}
    linear = set(_linear_coordinates(problem).tolist())
    for path, prior, places, units in _priors(layout, result):
        for element, unit, each in zip(places.ravel(), units.ravel(), _each(prior, places.shape), strict=True):
            coordinate = int(index[element])
            if coordinate in linear and coordinate in number:
                terms.add(number[coordinate], each, float(unit), float(lowest[coordinate]), path)
    return is_proper


def _add_amplitude_priors(terms: _Terms, prior, group: Rings, place: int, parameter: Parameter):
    """Add the priors of the amplitudes of rings, which are fractions of the fitted flux."""
    if prior is None:
        return
    if not isinstance(prior, dist.HalfCauchy | dist.HalfNormal | dist.Exponential):
        raise ValueError(
            f"Linear sampling wants no prior on {parameter.path}, or HalfCauchy, HalfNormal or Exponential; got "
            f"{type(prior).__name__}."
        )
    count = len(group.amplitudes)
    flux = group.start[:count].sum()
    # A source that isn't there has amplitudes of what could just be seen.
    least = 1 / np.sqrt(max(np.diag(terms.precision)[place : place + count].max(), 1e-300))
    unit = 1 / max(flux, least)
    rows = np.array(_each(prior, parameter.shape), dtype=object).reshape(-1, count)
    for ring, each in enumerate(rows[group.plane]):
        terms.add(place + ring, each, unit, 0.0, parameter.path)


def _add_total_priors(terms: _Terms, parameter: Parameter, group: Rings, place: int, units: np.ndarray):
    """Add the priors of the fluxes of all rings together."""
    if parameter.prior is None:
        return
    count, each = len(group.amplitudes), _each(parameter.prior, parameter.shape)
    total = group.start[:count].sum()
    for number, entry in enumerate(group.entries):
        mean, scale, log_mass = _normal(each[entry], 0.0, parameter.path)
        row, offset = np.zeros(len(terms.start)), 0.0
        row[place : place + count] = 1.0
        if number:
            ratio = place + count + number - 1
            row *= terms.start[ratio]
            row[ratio] = total
            offset = total * terms.start[ratio]
        terms.add_normal(row, mean / units[entry] + offset, scale / units[entry])
        terms.constant -= log_mass


def _each(prior: dist.Distribution, shape: tuple[int, ...]) -> list[dist.Distribution]:
    """Return the prior of every element of a parameter."""
    leaves, structure = jax.tree.flatten(prior)
    columns = [np.broadcast_to(np.asarray(leaf, dtype=float), shape).ravel() for leaf in leaves]
    return [jax.tree.unflatten(structure, [column[n] for column in columns]) for n in range(int(np.prod(shape)))]


def _normal(prior: dist.Distribution, low: float, path: str) -> tuple[float, float, float]:
    """Return mean and width of a normal prior, and the logarithm of its mass above the bound if it is cut off there."""
    base = getattr(prior, "base_dist", prior)
    cut = float(np.asarray(getattr(prior, "low", -np.inf)))
    is_cut = isinstance(prior, dist.LeftTruncatedDistribution)
    if not isinstance(base, dist.Normal) or not (prior is base or (is_cut and np.isclose(cut, low))):
        raise ValueError(
            f"Linear sampling wants no prior on {path}, or Normal, also cut off at the bound of the parameter, or for positive "
            f"numbers HalfNormal, Exponential or HalfCauchy; got {type(prior).__name__}."
        )
    mean, scale = float(np.asarray(base.loc)), float(np.asarray(base.scale))
    return mean, scale, float(log_ndtr((mean - cut) / scale)) if is_cut else 0.0
