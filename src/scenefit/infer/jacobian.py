"""The information matrix of all free coordinates, summed up on the host from derivative images of components.

A component's parameters move the pixels of its footprint alone. Components whose footprints are apart are differentiated
together, all fluxes of one in one image, and images are kept where they differ from zero: the number of renderings depends on
how crowded a field is, and memory on how much its sources cover. Free images are held fixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax import lax
from jaxtyping import Array, Float, Int

from scenefit.arrays import fourier
from scenefit.arrays.compilation import as_floats, as_integers, compiled
from scenefit.arrays.progress import with_progress
from scenefit.data.observation import Observation
from scenefit.infer.footprints import Footprints, covered_pixels, footprints, own_leaves
from scenefit.infer.posterior import Layout
from scenefit.infer.problem import AMPLITUDES, Problem, State
from scenefit.infer.quadratic import spread_curvature
from scenefit.infer.slopes import StampSlopes, model_canvas, stamp_slopes, untied
from scenefit.model.scene import Scene

NEGLIGIBLE = 1e-5
"""Derivative images are cut to where they are larger than this fraction of their largest value."""
SLOT_STEP = 8
"""Slots whose derivatives are computed at a time: always so many, since other numbers would be compiled anew."""
ACHROMATIC = ("shift", "rotation")
"""Parameters of an observation that act on all channels; each number of the others acts on one."""


def free_coordinates(problem: Problem) -> np.ndarray:
    """Return the free coordinates that any element uses."""
    index = np.unique(np.asarray(problem.index))
    return index[np.asarray(problem.free.vector)[index]]


def information_matrix(
    problem: Problem,
    state: State,
    layout: Layout,
    scene: Scene,
    observations: Sequence[Observation],
    slopes: Sequence[StampSlopes] | None = None,
    progress: bool = False,
) -> tuple[np.ndarray, scipy.sparse.csr_matrix]:
    """Return the Fisher information of the data about the free coordinates, plus the curvature of the priors.

    Parameters
    ----------
    problem, state, layout
        Of the scene, as `posterior.build` gives them.
    scene : Scene
    observations : sequence of Observation
        Matched.
    slopes : list of StampSlopes, optional
        `stamp_slopes` of the problem, if they are known already.
    progress : bool
        Whether to show a progress bar if it takes more than two seconds.

    Returns
    -------
    index : array of int, shape (m,)
        The free coordinates.
    information : sparse matrix, shape (m, m)
    """
    where = footprints(problem, layout, scene, observations)
    slopes = stamp_slopes(problem, state) if slopes is None else slopes
    index, total = np.asarray(where.index), _Sum()
    parts = _component_parts(problem, state, layout, scene, observations, where, slopes, progress)
    _add_own_parts(problem, state, slopes, where, parts)
    for own in parts:
        _add_products(own, total)
    _add_potential(problem, state, where, total)
    information = total.matrix(len(index))
    return index, 0.5 * (information + information.T).tocsr()


class _Block(NamedTuple):
    """Derivatives of the residuals of one observation, of one component or of the observation's own parameters.

    box : array of int, shape (4,)
        First and last+1 row, first and last+1 column in the observation's window.
    images : array, shape (channel, slot, h, w)
    places : array of int, shape (channel, slot)
        Which row of the information each is of; m for none.
    """

    box: np.ndarray
    images: np.ndarray
    places: np.ndarray

    def cut(self, box) -> np.ndarray:
        """Return the derivatives on part of the pixels, shape (channel, slot, pixel), in double precision."""
        y0, y1, x0, x1 = box
        piece = self.images[:, :, y0 - self.box[0] : y1 - self.box[0], x0 - self.box[2] : x1 - self.box[2]]
        return piece.reshape(*piece.shape[:2], -1).astype(float)


class _Sum:
    """A sparse matrix as a sum of entries."""

    def __init__(self):
        self.rows, self.columns, self.values = [np.zeros(0, int)], [np.zeros(0, int)], [np.zeros(0)]

    def add(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray):
        """Add blocks (..., a, b) at rows (..., a) and columns (..., b)."""
        shape = values.shape
        self.rows.append(np.broadcast_to(rows[..., :, None], shape).ravel())
        self.columns.append(np.broadcast_to(columns[..., None, :], shape).ravel())
        self.values.append(values.ravel())

    def matrix(self, size: int) -> scipy.sparse.csr_matrix:
        """Return the sum; rows and columns beyond `size` stand for what isn't free."""
        rows, columns, values = (np.concatenate(each) for each in (self.rows, self.columns, self.values))
        keep = (rows < size) & (columns < size) & (values != 0)
        return scipy.sparse.csr_matrix((values[keep], (rows[keep], columns[keep])), shape=(size, size))


def _component_parts(problem, state, layout, scene, observations, where, slopes, progress) -> list[list[_Block]]:
    """Return the parts of all components, for every observation."""
    parts: list[list[_Block]] = [[] for _ in problem.images]
    if not layout.members:
        return parts
    boxes = [covered_pixels([member.box for member in layout.members], scene.frame, obs) for obs in observations]
    starts = np.concatenate([[0], np.cumsum([len(stack.origin) for stack in problem.stacks])])
    numbers = np.array([starts[member.stack] + member.row for member in layout.members], int)
    places, color = np.asarray(where.places), np.asarray(where.color)
    missing = [places.shape[1] - len(each.gains) for each in slopes]
    gains = [np.pad(each.gains, ((0, more), (0, 0), (0, 0))) for each, more in zip(slopes, missing, strict=True)]
    gains = np.concatenate(gains, axis=1).swapaxes(0, 1)
    counts = places < len(where)
    colors = [c for c in range(int(color.max(initial=0)) + 1) if counts[numbers[color[numbers] == c]].any()]
    for c in with_progress(colors, "errors of fluxes", progress):
        slots = np.flatnonzero(counts[numbers[color[numbers] == c]].any(axis=(0, 2)))
        padded = np.pad(slots, (0, -len(slots) % SLOT_STEP), mode="edge").reshape(-1, SLOT_STEP)
        groups = [_images_of_color(problem, state, slopes, where.color, as_integers(c), as_integers(g)) for g in padded]
        for n, group in enumerate(zip(*jax.device_get(groups), strict=True)):
            image = np.concatenate(group)
            channels = np.array(problem.images[n].renderer.channels)
            for member in np.nonzero(color[numbers] == c)[0]:
                number, box = numbers[member], boxes[n][member]
                shown = image[: len(slots), :, box[0] : box[1], box[2] : box[3]].swapaxes(0, 1)
                shown = shown * gains[number][slots][:, channels].T[..., None, None].astype(shown.dtype)
                part = _cropped(_Block(box, shown, places[number][slots][:, channels].T))
                if part.images.size:
                    parts[n].append(part)
    return parts


def _cropped(part: _Block) -> _Block:
    """Return a part without the rows and columns about it that hold next to nothing."""
    size = np.abs(part.images)
    largest = size.max(axis=(2, 3), initial=0.0, keepdims=True)
    kept = (size > NEGLIGIBLE * largest).any(axis=(0, 1))
    rows, columns = (np.nonzero(kept.any(axis=axis))[0] for axis in (1, 0))
    if not len(rows):
        return _Block(part.box, part.images[:, :, :0, :0], part.places)
    (y0, y1), (x0, x1) = (each[[0, -1]] + [0, 1] for each in (rows, columns))
    box = part.box[[0, 0, 2, 2]] + [y0, y1, x0, x1]
    return _Block(box, np.ascontiguousarray(part.images[:, :, y0:y1, x0:x1]), part.places)


@compiled
def _images_of_color(
    problem: Problem,
    state: State,
    slopes: Sequence[StampSlopes],
    color: Int[Array, " member"],
    number: Int[Array, ""],
    slots: Int[Array, " slot"],
):
    """Return the derivatives of all residuals along slots of all components of a color, for a flux of 1 in each channel.

    Returns
    -------
    list of arrays, shape (slot, channel, y, x)
    """
    stacks, images = problem.fill(state)
    spectrum = fourier.transform(model_canvas(problem, state, slopes))
    render = [jax.linearize(lambda modes, i=image: i.residual(modes, "fisher"), spectrum)[1] for image in images]
    ends = np.cumsum([len(stack.origin) for stack in stacks])
    # All channels show the same, unless shapes differ between them.
    planes = max((each.stamps.shape[2] for each in slopes), default=1)

    def one(slot):
        canvas = jnp.zeros((planes, *problem.canvas[1:]), state.vector.dtype)
        for each, end in zip(slopes, ends, strict=True):
            canvas = each.add_to(canvas, color[end - len(each.origin) : end] == number, slot)
        modes = jnp.broadcast_to(fourier.transform(canvas), spectrum.shape)
        return [function(modes) for function in render]

    return lax.map(one, slots)


def _own_slots(problem: Problem, number: int, where: Footprints) -> tuple[np.ndarray, np.ndarray]:
    """Return elements and places of an observation's own parameters, shape (channel, slot)."""
    count, at = len(problem.images[number].data), 0
    own, elements, places = np.asarray(where.own_places[number]), [], []
    for leaf in own_leaves(problem, number):
        numbers = np.arange(leaf.start, leaf.stop)
        each = own[at : at + len(numbers)]
        at += len(numbers)
        for group, values in ((elements, numbers), (places, each)):
            group.append(np.tile(values, (count, 1)) if leaf.name in ACHROMATIC else values.reshape(count, -1))
    empty = np.zeros((count, 0), int)
    return np.concatenate([empty, *elements], axis=1), np.concatenate([empty, *places], axis=1)


def _add_own_parts(problem: Problem, state: State, slopes, where: Footprints, parts: list[list[_Block]]):
    """Add the parts of the observations' own parameters, as far as any is free."""
    slots, directions = [], []
    for number in range(len(problem.images)):
        elements, places = _own_slots(problem, number, where)
        used = (places < len(where)).any(axis=0)
        slots.append(places[:, used])
        directions.append(elements[:, used])
    count = max((each.shape[1] for each in slots), default=0)
    if not count:
        return
    basis = np.zeros((count, len(problem.index)))
    for each in directions:
        basis[np.broadcast_to(np.arange(each.shape[1]), each.shape), each] = 1.0
    images = jax.device_get(_own_images(problem, state, slopes, as_floats(basis)))
    for part, image, places in zip(parts, images, slots, strict=True):
        if places.size:
            height, width = image.shape[2:]
            shown = image[: places.shape[1]].swapaxes(0, 1)
            part.append(_Block(np.array([0, height, 0, width]), shown, places))


@compiled
def _own_images(problem: Problem, state: State, slopes, basis: Float[Array, "slot e"]):
    """Return the derivatives of all residuals along elements of the observations."""
    problem, state = untied(problem, state)
    spectrum = fourier.transform(model_canvas(problem, state, slopes))

    def residuals(vector):
        images = problem.fill(State(vector, state.images))[1]
        return [image.residual(spectrum, "fisher") for image in images]

    return lax.map(jax.linearize(residuals, state.vector)[1], basis)


def _add_products(parts: list[_Block], total: _Sum):
    """Add the products of the derivatives of an observation's residuals with one another."""
    for first, others in _overlaps(parts):
        a = parts[first]
        for second, box in others:
            b = parts[second]
            product = a.cut(box) @ b.cut(box).swapaxes(1, 2)
            total.add(a.places, b.places, product)
            if first != second:
                total.add(b.places, a.places, product.swapaxes(1, 2))


def _overlaps(parts: list[_Block]) -> Iterator[tuple[int, list[tuple[int, np.ndarray]]]]:
    """Yield every part with those from it on that share pixels with it, and the pixels (y0, y1, x0, x1) that they share."""
    boxes = np.array([part.box for part in parts], int).reshape(-1, 4)
    for first, box in enumerate(boxes):
        low, high = np.maximum(box[[0, 2]], boxes[first:, [0, 2]]), np.minimum(box[[1, 3]], boxes[first:, [1, 3]])
        shared = np.nonzero((low < high).all(axis=1))[0]
        ends = np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], axis=-1)
        yield first, [(first + int(n), ends[n]) for n in shared]


def _add_potential(problem: Problem, state: State, where: Footprints, total: _Sum):
    """Add the curvature of priors, as far as it is positive, of the noise's own parameters and of the sums of amplitudes."""
    if not problem.has_potential and not any(leaf.name == AMPLITUDES for leaf in problem.leaves):
        return
    spread, bend, rows = (np.asarray(each, dtype=float) for each in _potential(problem, state, _entries(problem)))
    index, places = np.asarray(where.index), np.asarray(where.element_places)
    own = np.arange(len(index))[:, None]
    total.add(own, own, spread[index][:, None, None])
    if len(rows):
        rows = scipy.sparse.csr_matrix(rows)
        product = (rows.T @ rows).tocoo()
        total.add(places[product.row][:, None], places[product.col][:, None], product.data[:, None, None])
    if not problem.priors:
        return
    for leaf in problem.leaves:
        elements = leaf.elements()
        # Priors are about one parameter each, whose entries are one row of a leaf.
        blocks = bend[: elements.shape[1], elements].transpose(1, 2, 0)
        values, vectors = np.linalg.eigh(0.5 * (blocks + blocks.swapaxes(1, 2)))
        blocks = np.einsum("nab,nb,ncb->nac", vectors, np.maximum(values, 0.0), vectors)
        total.add(places[elements], places[elements], blocks)


def _entries(problem: Problem) -> Float[Array, "entry e"]:
    """Return which elements are the first, second, ... entry of their parameter."""
    number = np.concatenate([np.zeros(0, int), *(_entry_numbers(leaf) for leaf in problem.leaves)])
    return as_floats(number == np.arange(number.max(initial=-1) + 1)[:, None])


def _entry_numbers(leaf) -> np.ndarray:
    """Return the number of every element of a leaf among those of its parameter."""
    elements = leaf.elements()
    return np.tile(np.arange(elements.shape[1]), len(elements))


@compiled
def _potential(problem: Problem, state: State, entries):
    """Return what the noise's parameters add to the diagonal, minus the second derivatives of the log-prior, and rows of J.

    The second are those along every element and the entries of its own parameter, shape (entry, e); the last those of the sums of
    amplitudes, shape (sum, e).
    """
    spread = spread_curvature(problem, state)
    problem, state = untied(problem, state)
    bend = jnp.zeros((0, len(state.vector)))
    if problem.priors:
        gradient = jax.grad(problem.log_prior)
        bend = -jax.vmap(lambda direction: jax.jvp(gradient, (state.vector,), (direction,))[1])(entries)
    scales = problem.scales(state.vector)
    if not scales:
        return spread, bend, jnp.zeros((0, len(state.vector)))
    return spread, bend, jax.jacrev(lambda vector: jnp.concatenate(problem.scales(vector)))(state.vector)
