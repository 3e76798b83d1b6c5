"""Which free coordinates move which pixels: where the derivatives of the model lie in every observation.

A component's parameters move the pixels of its footprint alone. Components whose footprints are apart are differentiated
together (they have one color), and only pairs of components whose footprints overlap have a product of derivatives: N
galaxies cost N times what one costs, not N^2 or more.
"""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import numpy as np
from jaxtyping import Array, Int

from scenefit.arrays.box import Box
from scenefit.arrays.compilation import as_integers
from scenefit.data.observation import Observation
from scenefit.infer.posterior import Layout
from scenefit.infer.problem import Leaf, Problem
from scenefit.infer.slopes import slot_of_elements
from scenefit.model.packing import component_box
from scenefit.model.scene import Scene
from scenefit.sky.frame import Frame, pixel_map, pixel_scale_of

CORE_LIGHT, CORE_ROOM, CORE_WINGS = 0.2, 1.6, 4.0
"""The core of a profile is by this ratio larger than what holds all but this fraction of its light; around it PSFs count up to so
many standard deviations. Nearly all of the curvature of the loss comes from there."""
CORE_SPREAD = 3
"""Pixels around it that whitening may reach."""
TILE = 64
"""Rows and columns of the tiles that overlaps are cut into."""
BLOCK = 7
"""Slots whose products are computed at a time, at most: those of a Sersic profile, which most components are."""


class Pairs(eqx.Module):
    """Pairs of blocks of slots of components whose footprints overlap in an observation, tile by tile; each with itself first.

    Attributes
    ----------
    members : array of int, shape (p, 2)
        Numbers of the components.
    blocks : array of int, shape (p, 2)
        Numbers of the blocks of their slots.
    box : array of int, shape (p, 4)
        First and last+1 row, first and last+1 column of a tile of what both cover, in the observation's window.
    num_single, count : int
        How many tiles there are of blocks with themselves, and in all; what follows is padding.
    window : (int, int)
        Rows and columns of a tile at most.
    """

    members: Int[Array, "p 2"]
    blocks: Int[Array, "p 2"]
    box: Int[Array, "p 4"]
    num_single: Int[Array, ""]
    count: Int[Array, ""]
    window: tuple[int, int] = eqx.field(static=True)


class Footprints(eqx.Module):
    """Where the derivatives along the free coordinates lie.

    All fluxes of a component are its first slot, the parameters of its shape the others.

    Attributes
    ----------
    index : array of int, shape (m,)
        The free coordinates.
    group : array of int, shape (m,)
        Which source each belongs to; the number of all members for those of observations.
    places : array of int, shape (member, slot, channel)
        Which of them is in a slot of a component, by channel of the model; m for none. Members are numbered through all stacks;
        there is a whole number of blocks of slots.
    own_places : tuple of arrays of int, shape (g,)
        The same for the parameters of each observation.
    element_places : array of int, shape (e,)
        The same for every element.
    color : array of int, shape (member,)
        Components of one color are apart from one another in all observations.
    visits : array of int, shape (v,)
        The pairs of color and slot (color times the number of slots, plus slot) that anything free is in; then padding.
    num_visits : int
    room : int
        So many colors as there are, or more: few distinct numbers.
    cores : array of int, shape (member, 4)
        First and last+1 row, first and last+1 column of the part of each stamp that is differentiated, on the canvas.
    pairs : tuple of Pairs
        For each observation.
    is_quick : bool
        Whether the curvature may be computed from cores alone, and correlated noise be taken as the same everywhere.
    """

    index: Int[Array, " m"]
    group: Int[Array, " m"]
    places: Int[Array, "member slot channel"]
    own_places: tuple[Int[Array, " _"], ...]
    element_places: Int[Array, " e"]
    color: Int[Array, " member"]
    visits: Int[Array, " v"]
    num_visits: Int[Array, ""]
    room: int = eqx.field(static=True)
    cores: Int[Array, "member 4"]
    pairs: tuple[Pairs, ...]
    is_quick: bool = eqx.field(static=True)

    def __len__(self):
        return len(self.index)


def footprints(
    problem: Problem,
    layout: Layout,
    scene: Scene,
    observations: Sequence[Observation],
    *,
    quick: bool = False,
) -> Footprints:
    """Return the footprints of the free coordinates.

    Parameters
    ----------
    problem : Problem
    layout : Layout
        Of the problem, as `posterior.build` gives it.
    scene : Scene
    observations : sequence of Observation
        Matched.
    quick : bool
        Whether to leave the faint outskirts of profiles and PSFs out, which add hardly anything to the curvature of the loss;
        see also `Footprints.is_quick`.
    """
    index = np.unique(np.asarray(problem.index))
    index = index[np.asarray(problem.free.vector)[index]]
    starts = np.concatenate([[0], np.cumsum([len(stack.origin) for stack in problem.stacks])]).astype(int)
    numbers = np.array([starts[member.stack] + member.row for member in layout.members], int)
    boxes = [member.box for member in layout.members]
    if quick:
        pairs = zip(layout.members, scene.components(), strict=True)
        boxes = [
            component_box(component, scene.frame, CORE_ROOM, CORE_LIGHT).intersection(member.box)
            for member, (_, component) in pairs
        ]
    covered = [covered_pixels(boxes, scene.frame, obs, quick=quick) for obs in observations]
    cores, color = np.zeros((starts[-1], 4), int), np.zeros(starts[-1], int)
    # All light that is on a footprint by itself, not just what a PSF brings there.
    reach = max((_margin(scene.frame, obs, quick) / _scale(scene.frame, obs) for obs in observations), default=0.0)
    ends = np.array([(*box.origin, *box.stop) for box in boxes]).reshape(-1, 4)[:, [0, 2, 1, 3]] + scene.frame.margin
    cores[numbers] = ends + int(np.ceil(reach)) * np.array([-1, 1, -1, 1])
    color[numbers] = disjoint_colors(np.concatenate(covered, axis=1)) if boxes else 0
    num_colors = int(color.max(initial=0)) + 1
    element_places = _element_places(problem, index)
    places, own_places = _places(problem, element_places, len(index), starts)
    is_used = (places != len(index)).any(axis=2)
    visits = _visits(color, is_used)
    group = np.full(len(index) + 1, len(places))
    counts = [sum(1 for _ in source.components(name)) for name, source in scene.sources.items()]
    for number, source in zip(numbers, np.repeat(np.arange(len(counts)), counts), strict=True):
        group[places[number].ravel()] = source
    return Footprints(
        index=as_integers(index),
        group=as_integers(group[: len(index)]),
        places=as_integers(places),
        own_places=tuple(as_integers(own) for own in own_places),
        element_places=as_integers(element_places),
        color=as_integers(color),
        visits=as_integers(np.pad(visits, (0, _room(len(visits)) - len(visits)))),
        num_visits=as_integers(len(visits)),
        room=_room(num_colors),
        cores=as_integers(cores),
        pairs=tuple(
            _pairs(numbers, part, is_used, image.data.shape[1:])
            for part, image in zip(covered, problem.images, strict=True)
        ),
        is_quick=quick,
    )


def _visits(color: np.ndarray, is_used: np.ndarray) -> np.ndarray:
    """Return the pairs of color and slot that anything free is in, given which slots (member, slot) members use."""
    num_slots = is_used.shape[1]
    return np.unique((color[:, None] * num_slots + np.arange(num_slots))[is_used])


def _room(count: int) -> int:
    """Return the next power of 2: few distinct shapes; the padding costs memory alone."""
    return 1 << max(count - 1, 0).bit_length()


def block_size(num_slots: int) -> int:
    """Return how many slots make a block."""
    return min(num_slots, BLOCK)


def own_leaves(problem: Problem, number: int) -> list[Leaf]:
    """Return the leaves of an observation."""
    return [leaf for leaf in problem.leaves if leaf.kind == "image" and leaf.number == number]


def _element_places(problem: Problem, index: np.ndarray) -> np.ndarray:
    """Return `Footprints.element_places`."""
    place_of = np.full(len(problem.lowest.vector), len(index))
    place_of[index] = np.arange(len(index))
    return place_of[np.asarray(problem.index)]


def _places(problem: Problem, place_of: np.ndarray, none: int, starts: np.ndarray):
    """Return `Footprints.places` and `Footprints.own_places`, from those of the elements."""
    slot, counts = slot_of_elements(problem)
    num_slots = max(counts, default=1)
    num_slots = -(-num_slots // block_size(num_slots)) * block_size(num_slots)
    places = np.full((starts[-1], num_slots, problem.canvas[0]), none)
    for leaf in problem.leaves:
        if leaf.kind != "stack":
            continue
        first, elements = starts[leaf.number], leaf.elements()
        members = np.arange(first, first + len(elements))[:, None]
        if leaf.name == "flux":
            stack = problem.stacks[leaf.number]
            shown = np.take_along_axis(place_of[elements], np.asarray(stack.flux_index), axis=1)
            places[members[:, 0], 0] = np.where(np.asarray(stack.flux_gain) != 0, shown, none)
        else:
            places[members, slot[elements]] = place_of[elements][..., None]
    own = [
        np.concatenate([place_of[leaf.start : leaf.stop] for leaf in own_leaves(problem, number)] or [np.zeros(0, int)])
        for number in range(len(problem.images))
    ]
    return places, own


def covered_pixels(boxes: Sequence[Box], frame: Frame, obs: Observation, *, quick: bool = False) -> np.ndarray:
    """Return (y0, y1, x0, x1) of what boxes of the frame cover in an observation's window, PSF included, shape (box, 4)."""
    window, margin = obs.matched_renderer.window, _margin(frame, obs, quick)
    ends = np.array([(*box.origin, *box.stop) for box in boxes], float).reshape(-1, 4)
    places = np.stack([ends[:, [0, 0, 2, 2]], ends[:, [1, 3, 1, 3]]], axis=-1)
    corners = pixel_map(frame.wcs, obs.wcs, *np.moveaxis(obs.apparent_positions(places, frame), -1, 0))
    low = np.floor(corners.min(axis=1) - margin).astype(int) - window.origin
    high = np.ceil(corners.max(axis=1) + margin).astype(int) + 1 - window.origin
    low, high = np.clip(low, 0, window.shape), np.clip(high, 0, window.shape)
    return np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], axis=-1)


def _scale(frame: Frame, obs: Observation) -> float:
    """Return the width of a pixel of the frame in pixels of an observation."""
    return 1.0 if frame.wcs is None else pixel_scale_of(frame.wcs) / pixel_scale_of(obs.wcs)


def _margin(frame: Frame, obs: Observation, quick: bool) -> float:
    """Return how far, in pixels of an observation, light spreads beyond a box of the frame."""
    reach = min(obs.psf.extent, CORE_WINGS * obs.psf.effective_sigma.max()) if quick else obs.psf.extent
    # Whitening spreads what is correlated.
    spread = min(obs.noise.reach, CORE_SPREAD) if quick else obs.noise.reach
    return reach + 2 + 2 * _scale(frame, obs) + spread


def _intersections(covered: np.ndarray) -> np.ndarray:
    """Return what every two of the boxes (member, 4) share, shape (member, member, 4)."""
    y0, y1, x0, x1 = covered.T
    return np.stack(
        [
            np.maximum(y0[:, None], y0),
            np.minimum(y1[:, None], y1),
            np.maximum(x0[:, None], x0),
            np.minimum(x1[:, None], x1),
        ],
        axis=-1,
    )


def _is_empty(boxes: np.ndarray) -> np.ndarray:
    """Return which boxes (..., 4) hold no pixel."""
    return (boxes[..., 0] >= boxes[..., 1]) | (boxes[..., 2] >= boxes[..., 3])


def _pairs(numbers: np.ndarray, covered: np.ndarray, is_used: np.ndarray, shape: tuple[int, ...]) -> Pairs:
    """Return the pairs of blocks of components that share pixels of an observation."""
    shared = _intersections(covered)
    some = ~_is_empty(shared)
    block = block_size(is_used.shape[1])
    blocks = np.any(is_used.reshape(len(is_used), is_used.shape[1] // block, block), axis=2)[numbers]
    owner, own_block = np.nonzero(blocks & np.diagonal(some)[:, None])
    ends = np.stack(np.triu_indices(len(owner), 1), axis=-1)
    ends = ends[some[owner[ends[:, 0]], owner[ends[:, 1]]]]
    ends = np.concatenate([np.repeat(np.arange(len(owner))[:, None], 2, axis=1), ends])
    first, second = owner[ends].T
    height, width = (min(TILE, limit) for limit in shape)
    rows, boxes = _tiles(shared[first, second], height, width)
    padding = ((0, _room(max(len(boxes), 1)) - len(boxes)), (0, 0))
    return Pairs(
        members=as_integers(np.pad(numbers[owner[ends]].reshape(-1, 2)[rows], padding)),
        blocks=as_integers(np.pad(own_block[ends].reshape(-1, 2)[rows], padding)),
        box=as_integers(np.pad(boxes, padding)),
        num_single=as_integers(np.sum(rows < len(owner))),
        count=as_integers(len(boxes)),
        window=(height, width),
    )


def _tiles(boxes: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut boxes (n, 4) into tiles; return which box each is of, in order, and the tiles, shape (tile, 4)."""
    rows, tiles = [np.zeros(0, int)], [np.zeros((0, 4), int)]
    for number, (y0, y1, x0, x1) in enumerate(boxes):
        top, left = (
            part.ravel() for part in np.meshgrid(np.arange(y0, y1, height), np.arange(x0, x1, width), indexing="ij")
        )
        tiles.append(np.stack([top, np.minimum(top + height, y1), left, np.minimum(left + width, x1)], axis=-1))
        rows.append(np.full(len(top), number))
    return np.concatenate(rows), np.concatenate(tiles)


def disjoint_colors(covered: np.ndarray) -> np.ndarray:
    """Return numbers such that components of one number have disjoint boxes (member, 4 x observation) everywhere (greedy)."""
    count = len(covered)
    overlap = np.zeros((count, count), bool)
    for boxes in covered.reshape(count, -1, 4).swapaxes(0, 1):
        overlap |= ~_is_empty(_intersections(boxes))
    colors = np.full(count, -1)
    for number in range(count):
        taken = set(colors[overlap[number]]) - {-1}
        colors[number] = next(color for color in range(count) if color not in taken)
    return colors
