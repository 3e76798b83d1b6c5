"""Fluxes and backgrounds of one image, the sources' shapes and places given: one linear solution with its covariance."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from numpyro.distributions import constraints
from scipy.sparse.csgraph import connected_components

from scenefit.arrays.compilation import as_booleans, as_floats, compiled
from scenefit.data.observation import Observation
from scenefit.infer import posterior
from scenefit.infer.footprints import Footprints, footprints
from scenefit.infer.information import information
from scenefit.infer.pointing import Geometry, geometry, probes
from scenefit.infer.problem import Problem, State
from scenefit.infer.templates import (
    Exposure,
    Windows,
    as_exposure,
    choose_windows,
    half_size,
    highest_frequency,
    stamp_groups,
    templates,
)
from scenefit.model.morphology import links
from scenefit.model.packing import transform_stacks
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource
from scenefit.model.spectrum import ArraySpectrum
from scenefit.sky.frame import Channel, band_of, with_channels

MAX_ROUNDS = 50
"""Reweighted solutions at most, for noise that isn't Gaussian."""
ROUND_TOLERANCE = 1e-3
"""Change of the fluxes, in standard errors, below which they are the last."""
SINGULAR = 50
"""Rounding errors below which an eigenvalue of the information, scaled to unit diagonal, says nothing."""
LEAK = 1e-3
"""Part of the square of a combination of fluxes that may lie along what isn't determined."""
FEW = 200
"""Unknowns up to which their covariance is computed by one thread."""
LEAST_LIGHT = 1e-3
"""Fraction of a component's flux that must fall on valid pixels for these to say anything about it."""
MAX_SIZE = 5 * 10**7
"""Pixels of all templates of an observation up to which they are made one by one; beyond, those far apart share images."""
MAX_SHEAR = 0.02
"""Observed pixels by which the edge of a stamp may be misplaced where the scale of an observation varies over it."""


class NormalEquations(eqx.Module):
    """What an image says of the fluxes and backgrounds, channel by channel, about some values of them.

    Attributes
    ----------
    values : array, shape (channel, m)
        Fluxes of all components, and the background, in units of the noise level.
    matrix : array, shape (channel, m, m)
        Fisher information.
    gradient : array, shape (channel, m)
        Of minus the log-likelihood, at the values.
    light : array, shape (channel, component)
        Fraction of the flux on valid pixels.
    deviance : array, shape (channel,)
        Chi-square, at the values.
    num_pixels : array of int, shape (channel,)
        With information.
    is_settled : array of bool, shape ()
        Whether the values have stopped changing.
    """

    values: Float[np.ndarray | Array, "channel m"]
    matrix: Float[np.ndarray | Array, "channel m m"]
    gradient: Float[np.ndarray | Array, "channel m"]
    light: Float[np.ndarray | Array, "channel n"]
    deviance: Float[np.ndarray | Array, " channel"]
    num_pixels: Int[np.ndarray | Array, " channel"]
    is_settled: Bool[np.ndarray | Array, ""]


# Compiled with all of XLA's optimisations, unlike most of scenefit: the interpolation takes twice as long without.
@eqx.filter_jit
def normal_equations(modes, windows, exposure: Exposure, free_background: bool) -> NormalEquations:
    """Return the normal equations of all fluxes (and backgrounds) about their solution in working precision.

    They are solved once here and, about that solution, again in double precision on the host: rounding in the matrix then
    hardly matters. Noise that isn't Gaussian is reweighted until the values no longer change.

    Parameters
    ----------
    modes : sequence of arrays
        `Stamps.modes`.
    windows : sequence of Windows
    exposure : Exposure
    free_background : bool
        Whether the last column is a constant.
    """
    design = templates(modes, windows, exposure, int(free_background))
    seen = exposure.valid.astype(design.dtype)
    light = jnp.einsum("cmyx,cyx->cm", design, seen, precision="highest") / exposure.scale[:, None]
    light = light[:, : design.shape[1] - free_background]
    counts = jnp.pad(light > LEAST_LIGHT, ((0, 0), (0, int(free_background))), constant_values=True)
    noise = exposure.noise

    def residual(values, kind="score"):
        model = jnp.einsum("cm,cmyx->cyx", values, design, precision="highest")
        return getattr(noise, f"{kind}_residual")(model - exposure.data)

    def slopes(values, kind="score"):
        model = jnp.einsum("cm,cmyx->cyx", values, design, precision="highest") - exposure.data
        value, along = jax.linearize(getattr(noise, f"{kind}_residual"), model)
        return value, jax.vmap(along, in_axes=1, out_axes=1)(design)

    def equations(values, kind="score"):
        value, rows = slopes(values, kind)
        # Products of matrices channel by channel: many at a time are slower on CPUs.
        flat = rows.reshape(*rows.shape[:2], -1)
        matrix = lax.map(lambda part: jnp.matmul(part, part.T, precision="highest"), flat)
        return matrix, jnp.einsum("cmyx,cyx->cm", rows, value, precision="highest"), rows

    start = jnp.zeros(design.shape[:2], design.dtype)
    matrix, gradient, rows = equations(start)
    values = start - solved(matrix, gradient, counts)
    if noise.is_gaussian:
        gradient = jnp.einsum("cmyx,cyx->cm", rows, residual(values), precision="highest")
        is_settled = jnp.asarray(True)
    else:

        def turn(carry):
            values, _, number = carry
            matrix, gradient, _ = equations(values)
            step = solved(matrix, gradient, counts)
            size = jnp.max(jnp.abs(step) * jnp.sqrt(jnp.diagonal(matrix, axis1=1, axis2=2)))
            return values - step, size, number + 1

        values, size, _ = lax.while_loop(
            lambda carry: (carry[1] > ROUND_TOLERANCE) & (carry[2] < MAX_ROUNDS),
            turn,
            (values, jnp.asarray(jnp.inf, design.dtype), jnp.asarray(0)),
        )
        is_settled = size <= ROUND_TOLERANCE
        gradient = equations(values)[1]
        matrix = equations(values, "fisher")[0]
    deviance = jnp.sum(residual(values, "deviance") ** 2, axis=(1, 2))
    num_pixels = jnp.sum(exposure.valid, axis=(1, 2))
    return NormalEquations(values, matrix, gradient, light, deviance, num_pixels, is_settled)


def solved(
    matrix: Float[Array, "channel m m"], gradient: Float[Array, "channel m"], counts: Bool[Array, "channel m"]
) -> Float[Array, "channel m"]:
    """Return the solution of linear equations, small along what they don't determine; 0 for unknowns that don't count."""
    diagonal = jnp.diagonal(matrix, axis1=1, axis2=2)
    counts &= diagonal > 0
    unit = jnp.where(counts, 1 / jnp.sqrt(jnp.where(counts, diagonal, 1.0)), 0.0)
    size = matrix.shape[-1]
    extra = jnp.where(counts, 0.0, 1.0) + size * 10 * jnp.finfo(matrix.dtype).eps
    scaled = matrix * unit[:, :, None] * unit[:, None, :] + extra[:, :, None] * jnp.eye(size, dtype=matrix.dtype)

    def one(part, slope):
        return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(part), True), slope)

    return unit * lax.map(lambda pair: one(*pair), (scaled, gradient * unit))


class FluxSolution(eqx.Module):
    """Values of the fluxes and the background in one channel, and what is known of them.

    Attributes
    ----------
    values : array, shape (m,)
        Components in order, then the background if it is free; NaN where there are no data.
    covariance : array, shape (m, m)
        As if what isn't determined were known: for combinations that are.
    lost : array, shape (m, k)
        Orthonormal directions, in units of `scale`, that aren't determined.
    scale : array, shape (m,)
        Conditional standard errors; infinite where there are no data.
    light : array, shape (component,)
        Fraction of the flux on valid pixels.
    deviance : float
        Chi-square.
    num_pixels : int
        With information.
    is_settled : bool
    """

    values: np.ndarray
    covariance: np.ndarray
    lost: np.ndarray
    scale: np.ndarray
    light: np.ndarray
    deviance: float
    num_pixels: int
    is_settled: bool

    def combined(self, weights: scipy.sparse.csr_array) -> tuple[np.ndarray, np.ndarray]:
        """Return sums of the values and their covariance, for a sparse matrix of weights, shape (sum, m).

        Sums that depend on what has no data are NaN; those and sums that aren't determined have infinite variances and no
        covariances.
        """
        seen = np.isfinite(self.scale)
        has_data = abs(weights) @ ~seen == 0
        scaled = weights * np.where(seen, self.scale, 0.0)
        leak = np.sum((scaled @ self.lost) ** 2, axis=1)
        is_known = has_data & (leak <= LEAK * (scaled * scaled).sum(axis=1))
        covariance = weights @ (weights @ self.covariance).T
        covariance[~is_known] = 0.0
        covariance[:, ~is_known] = 0.0
        np.fill_diagonal(covariance, np.where(is_known, np.diagonal(covariance), np.inf))
        return np.where(has_data, weights @ np.where(seen, self.values, 0.0), np.nan), covariance

    def confused(self) -> list[np.ndarray]:
        """Return the sets of numbers whose values can't be told apart."""
        if not self.lost.shape[1]:
            return []
        projection = self.lost @ self.lost.T
        part = np.diag(projection) > LEAK
        linked = (np.abs(projection) > LEAK) & part & part[:, None]
        _, block = connected_components(linked, directed=False)
        return [np.nonzero(part & (block == number))[0] for number in np.unique(block[part])]


def solution(equations: NormalEquations, channel: int, order: np.ndarray, unit: float) -> FluxSolution:
    """Return the solution of one channel in double precision.

    Parameters
    ----------
    equations : NormalEquations
        As NumPy arrays.
    channel : int
    order : array of int
        Where components, and the background, are among the unknowns.
    unit : float
        Of the fluxes.
    """
    count = len(equations.light[channel])
    light = np.asarray(equations.light[channel], float)[order[order < count]]
    matrix = np.asarray(equations.matrix[channel], float)[np.ix_(order, order)]
    slope = np.asarray(equations.gradient[channel], float)[order]
    values = np.asarray(equations.values[channel], float)[order]
    diagonal = np.diag(matrix)
    seen = diagonal > 0
    seen[: len(light)] &= light > LEAST_LIGHT
    scale = 1 / np.sqrt(diagonal[seen])
    inverse, lost = _inverse(matrix[np.ix_(seen, seen)] * scale[:, None] * scale, equations.matrix.dtype)
    step = -scale * (inverse @ (scale * slope[seen]))
    size = len(order)
    covariance, directions = np.zeros((size, size)), np.zeros((size, lost.shape[1]))
    covariance[np.ix_(seen, seen)] = inverse * scale[:, None] * scale * unit**2
    directions[seen] = lost
    all_values, all_scales = np.full(size, np.nan), np.full(size, np.inf)
    all_values[seen] = (values[seen] + step) * unit
    all_scales[seen] = scale * unit
    return FluxSolution(
        values=all_values,
        covariance=covariance,
        lost=directions,
        scale=all_scales,
        light=light,
        deviance=float(equations.deviance[channel] + slope[seen] @ step),
        num_pixels=int(equations.num_pixels[channel]),
        is_settled=bool(equations.is_settled),
    )


def _inverse(scaled: np.ndarray, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the inverse of a matrix of unit diagonal, known with the precision of a type, and directions where it has none."""
    least = SINGULAR * float(np.finfo(dtype).eps)
    none = np.zeros((len(scaled), 0))
    if not len(scaled):
        return scaled, none
    factor, failed = scipy.linalg.lapack.dpotrf(scaled, lower=1)
    # The squares of the pivots bound the smallest eigenvalue from above; a hundred times less is rare.
    if not failed and np.diag(factor).min() ** 2 > 100 * least:
        root, _ = scipy.linalg.lapack.dtrtri(factor, lower=1)
        root = np.tril(root)
        # Products of this size wake the threads of BLAS, which then keep the cores from the device for long: not worth it.
        return np.einsum("ki,kj->ij", root, root) if len(root) <= FEW else root.T @ root, none
    values, vectors = np.linalg.eigh(scaled)
    known = values > least
    return (vectors[:, known] / values[known]) @ vectors[:, known].T, vectors[:, ~known]


class FluxSolver:
    """Solves for the fluxes of the components of a scene in many observations: holds all that no observation changes.

    Parameters
    ----------
    scene : Scene
    observations : sequence of Observation
        They say which bands links are evaluated in.
    """

    def __init__(self, scene: Scene, observations: Sequence[Observation]):
        bands = tuple(dict.fromkeys(band_of(channel) for obs in observations for channel in obs.channels))
        is_linked = any(links(component.morphology) for _, component in scene.components())
        self.scene, self.bands = scene, bands if is_linked else bands[:1]
        self.groups = stamp_groups(list(unit_scene(scene, self.bands).stamps().values()))
        self.places = np.zeros((sum(len(group.members) for group in self.groups), 2))
        for group in self.groups:
            self.places[group.members] = group.places
        self.on_sky = probes(scene.frame, self.places)

    def layout(self, has_background: bool) -> np.ndarray:
        """Return where the components, and the background, are among the unknowns of `normal_equations`."""
        starts = np.concatenate([[0], np.cumsum([group.modes.shape[-1] // 2 for group in self.groups])])
        order = np.zeros(len(self.places), int)
        for group, start in zip(self.groups, starts, strict=False):
            order[group.members] = start + np.arange(len(group.members))
        return np.append(order, starts[-1]) if has_background else order

    def geometry(self, obs: Observation) -> Geometry:
        """Return where the components lie in an observation."""
        return geometry(self.scene.frame, obs, self.places, self.on_sky)

    def is_local(self, obs: Observation, where: Geometry) -> bool:
        """Whether templates can be made one by one: they aren't too many, nor the scale too different among them."""
        size = sum(group.modes.shape[-1] // 2 for group in self.groups) * obs.shape[0] * np.prod(where.window.shape)
        return bool(size <= MAX_SIZE) and where.bend * max(group.side for group in self.groups) / 2 <= MAX_SHEAR

    def windows(self, observations: Sequence[Observation], where: Sequence[Geometry]) -> list[Windows]:
        """Return windows that serve all of some observations of one shape, by group of stamps."""
        pairs = [(obs, each.jacobian) for obs, each in zip(observations, where, strict=True)]
        frequency = max(highest_frequency(*pair).max() for pair in pairs)
        return [
            choose_windows(max(half_size(group, *pair).max() for pair in pairs), frequency, where[0].window.shape)
            for group in self.groups
        ]

    def exposure(self, obs: Observation, windows: Sequence[Windows], where: Geometry) -> Exposure:
        """Return an observation as the solver sees it."""
        plane = [self.bands.index(band_of(c)) if len(self.bands) > 1 else 0 for c in obs.channels]
        return as_exposure(self.scene.frame, obs, self.groups, windows, where, plane)

    def equations(self, windows: Sequence[Windows], exposure: Exposure, free_background: bool) -> NormalEquations:
        """Return the normal equations of an observation, its unknowns in the order of `layout`."""
        return normal_equations([group.modes for group in self.groups], list(windows), exposure, free_background)


def unit_scene(scene: Scene, channels: Sequence[Channel]) -> Scene:
    """Return the scene in other channels, all components with unit flux in each."""
    old = scene.frame
    frame = with_channels(old, channels)

    def replaced(source):
        if isinstance(source, CompositeSource):
            return source.with_parts({name: replaced(part) for name, part in source.parts.items()})
        return source.replace(spectrum=ArraySpectrum(np.ones(len(frame.channels))))

    return Scene(frame, {name: replaced(source) for name, source in scene.sources.items()})


def wide_equations(scene: Scene, obs: Observation, free_background: bool) -> NormalEquations:
    """Return the normal equations of an observation of any size and WCS: components in order, then the background.

    As `FluxSolver.equations`, but from images of all components that are apart together (see `information`).
    """
    scene = unit_scene(scene, obs.channels)
    obs = obs.match(scene.frame)
    fluxes, background = "sources.*.spectrum.flux", f"observations.{obs.name}.background"
    parameters = Parameters.default(scene, [obs]).fix("sources").fix("observations")
    parameters = parameters.free(fluxes).constrain(fluxes, constraints.real)
    if free_background:
        parameters = parameters.free(background)
    problem, state, layout = posterior.build(scene, [obs], parameters)
    where = footprints(problem, layout, scene, [obs])
    coordinates = [index for index, _ in posterior.flux_coordinates(problem, layout)]
    num_components = len(coordinates)
    if free_background:
        coordinates.append(np.asarray(problem.index)[layout.places[background][0]])
    places = np.searchsorted(np.asarray(where.index), np.stack(coordinates, axis=1))
    vector = np.asarray(state.vector).copy()
    vector[np.asarray(where.index)[places[:, :num_components]]] = 0.0
    state, is_settled = State(as_floats(vector), state.images), False
    valid = _counted(obs)
    light = np.asarray(_wide_light(problem, state, where, as_booleans(valid)))[places]
    light[:, num_components:] = 1.0
    counts = np.zeros(len(where), bool)
    counts[places] = light > LEAST_LIGHT
    for _ in range(MAX_ROUNDS):
        matrix = _wide_information(problem, state, where, "score")
        state, size = _wide_step(problem, state, where, matrix, as_booleans(counts))
        is_settled = problem.is_gaussian or float(size) <= ROUND_TOLERANCE
        if is_settled:
            break
    if not problem.is_gaussian:
        matrix = _wide_information(problem, state, where, "fisher")
    gradient, deviance = _wide_outcome(problem, state, where)
    values = np.asarray(state.vector)[np.asarray(where.index)][places]
    if free_background:
        values[:, -1] -= np.asarray(problem.images[0].background)
    return NormalEquations(
        values=values,
        matrix=np.asarray(matrix)[places[:, :, None], places[:, None, :]],
        gradient=np.asarray(gradient)[places],
        light=light[:, :num_components],
        deviance=np.asarray(deviance),
        num_pixels=valid.sum(axis=(1, 2)),
        is_settled=np.asarray(is_settled),
    )


def _counted(obs: Observation) -> np.ndarray:
    """Return which pixels of the renderer's window count."""
    renderer = obs.matched_renderer
    return obs.noise.valid[(slice(None), *renderer.window.slices)] & renderer.inside


_wide_information = compiled(information)


@compiled
def _wide_light(problem: Problem, state: State, where: Footprints, valid: Bool[Array, "channel y x"]):
    """Return how much of every flux falls on valid pixels."""

    def on_pixels(vector):
        stacks, (image,) = problem.fill(State(vector, state.images))
        spectrum = transform_stacks(stacks, problem.psf_sigma, problem.canvas)
        rendered = image.renderer(spectrum, image.shift, image.psf_variance, image.rotation)
        return jnp.sum(jnp.where(valid, rendered * image.gain[:, None, None], 0.0))

    return jax.grad(on_pixels)(state.vector)[where.index]


@compiled
def _wide_step(
    problem: Problem, state: State, where: Footprints, matrix: Float[Array, "m m"], counts: Bool[Array, " m"]
):
    """Return the state at the minimum of the quadratic model of the loss, and its largest change in standard errors."""
    gradient = jax.grad(problem.loss)(state).vector[where.index]
    step = solved(matrix[None], gradient[None], counts[None])[0]
    size = jnp.max(jnp.abs(step) * jnp.sqrt(jnp.diagonal(matrix)))
    return State(state.vector.at[where.index].add(-step), state.images), size


@compiled
def _wide_outcome(problem: Problem, state: State, where: Footprints):
    """Return the gradient of the loss and the chi-square of each channel."""
    gradient = jax.grad(problem.loss)(state).vector[where.index]
    (residual,), _ = problem.residuals(state, "deviance")
    return gradient, jnp.sum(residual**2, axis=(1, 2))
