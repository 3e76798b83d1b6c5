"""The information J^T J of the free coordinates, from the derivatives of each component on its own footprint."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from scenefit.arrays import fourier
from scenefit.infer.footprints import Footprints, Pairs, block_size, own_leaves
from scenefit.infer.problem import Image, Problem, State
from scenefit.infer.slopes import StampSlopes, model_canvas, slopes_of_stamps, untied


def information(
    problem: Problem,
    state: State,
    where: Footprints,
    kind: str = "score",
    slopes: Sequence[StampSlopes] | None = None,
) -> Float[Array, "m m"]:
    """Return J^T J of the residuals along the free coordinates.

    Parameters
    ----------
    problem : Problem
    state : State
    where : Footprints
        Of the problem.
    kind : "score" or "fisher"
        Which residuals: see `Problem.residuals`.
    slopes : list of StampSlopes, optional
        Those at the state, if they are known already.

    Returns
    -------
    array, shape (m, m)
        By `where.index`; as if no component moved a pixel outside its footprint. Quick footprints (`Footprints.is_quick`) take
        the noise of components as the same everywhere.
    """
    # Every element is a coordinate of its own here; those that are tied come together where the products are added up.
    problem, state = untied(problem, state)
    size = len(where)
    total = jnp.zeros((size + 1, size + 1), state.vector.dtype)
    slopes = slopes_of_stamps(problem, state) if slopes is None else slopes
    spectrum = fourier.transform(model_canvas(problem, state, slopes))
    local, gains = _component_images(problem, state, where, kind, spectrum, slopes)
    for number, (images, pairs) in enumerate(zip(local, where.pairs, strict=True)):
        channels = np.array(problem.images[number].renderer.channels)
        own = _own_images(problem, state, where, number, kind, spectrum)
        places = where.own_places[number]
        total = total.at[places[:, None], places].add(jnp.einsum("acyx,bcyx->ab", own, own, precision="highest"))
        total = _add_pairs(total, images, gains[..., channels], own, pairs, where, channels, places)
    scales = problem.scales(state.vector)
    if scales:
        rows = jax.jacfwd(lambda vector: jnp.concatenate(problem.scales(vector)))(state.vector)
        total = total.at[where.element_places[:, None], where.element_places].add(
            jnp.matmul(rows.T, rows, precision="highest")
        )
    return total[:size, :size]


def _component_images(problem: Problem, state: State, where: Footprints, kind: str, spectrum, slopes):
    """Return the derivatives of the residuals along the slots of all components of a color together.

    Returns
    -------
    list of arrays, shape (color, slot, channel, y, x)
        One an observation: of components without a spectrum, one flux for all channels.
    array, shape (member, slot, channel)
        What their images have to be multiplied with.
    """
    images = problem.fill(state)[1]
    render = [_along_spectrum(image.quick() if where.is_quick else image, kind, spectrum) for image in images]
    num_slots = where.places.shape[1]
    ends = np.cumsum([len(each.origin) for each in slopes])
    # All channels show the same, unless shapes differ between them.
    planes = max((each.stamps.shape[2] for each in slopes), default=1)

    def one(number):
        color, slot = number // num_slots, number % num_slots
        canvas = jnp.zeros((planes, *problem.canvas[1:]), state.vector.dtype)
        for each, end in zip(slopes, ends, strict=True):
            members = slice(end - len(each.origin), end)
            canvas = each.add_to(canvas, where.color[members] == color, slot, where.cores[members])
        modes = jnp.broadcast_to(fourier.transform(canvas), spectrum.shape)
        return [function(modes) for function in render]

    def step(visit, filled):
        number = where.visits[visit]
        return [images.at[number].set(image) for images, image in zip(filled, one(number), strict=True)]

    blank = [jnp.zeros((where.room * num_slots, *image.data.shape), image.data.dtype) for image in images]
    filled = lax.fori_loop(0, where.num_visits, step, blank)
    return [part.reshape(-1, num_slots, *part.shape[1:]) for part in filled], _padded_gains(slopes, num_slots)


def _padded_gains(slopes: Sequence[StampSlopes], num_slots: int) -> Float[Array, "member slot channel"]:
    """Return the gains of all members, through all stacks, with so many slots."""
    rows = [jnp.pad(each.gains, ((0, num_slots - len(each.gains)), (0, 0), (0, 0))) for each in slopes]
    return jnp.concatenate([row.swapaxes(0, 1) for row in rows])


def _along_spectrum(image: Image, kind: str, spectrum: Complex[Array, "channel k l"]) -> Callable:
    """Return the derivative of an observation's residuals along the transform of the model image."""
    return jax.linearize(lambda modes: image.residual(modes, kind), spectrum)[1]


def _own_images(
    problem: Problem, state: State, where: Footprints, number: int, kind: str, spectrum
) -> Float[Array, "g channel y x"]:
    """Return the derivatives of an observation's residuals along its own parameters."""

    def derivatives(leaves, is_quick):
        elements = [np.arange(leaf.start, leaf.stop) for leaf in leaves]
        if not elements:
            return jnp.zeros((0, *problem.images[number].data.shape), state.vector.dtype)

        def residual(vector):
            image = problem.fill(State(vector, state.images))[1][number]
            return (image.quick() if is_quick else image).residual(spectrum, kind)

        along = jax.linearize(residual, state.vector)[1]
        basis = np.concatenate(elements)[:, None] == np.arange(len(state.vector))
        return lax.map(along, jnp.asarray(basis, state.vector.dtype))

    leaves = own_leaves(problem, number)
    # Along parameters of the noise the residuals themselves count; these leaves come last.
    of_noise = [leaf for leaf in leaves if leaf.name.startswith("noise.")]
    others = leaves[: len(leaves) - len(of_noise)]
    return jnp.concatenate([derivatives(others, where.is_quick), derivatives(of_noise, False)])


def _add_pairs(total, images, gains, own, pairs: Pairs, where: Footprints, channels, own_places):
    """Add the products of the derivatives of components with one another and with those of the observation."""
    _, num_slots, num_channels, height, width = images.shape
    window, block = pairs.window, block_size(num_slots)

    def corner(box):
        zero = jnp.zeros_like(box[0])
        return zero, jnp.minimum(box[0], height - window[0]), jnp.minimum(box[2], width - window[1])

    def tile(member, first, box):
        zero, y, x = corner(box)
        start = where.color[member], first * block, zero, y, x
        cut = lax.dynamic_slice(images, start, (1, block, num_channels, *window))[0]
        gain = lax.dynamic_slice_in_dim(gains[member], first * block, block)
        rows, columns = y + jnp.arange(window[0]), x + jnp.arange(window[1])
        inside = ((rows >= box[0]) & (rows < box[1]))[:, None] & (columns >= box[2]) & (columns < box[3])
        return jnp.where(inside, cut * gain[..., None, None], 0.0).reshape(block, num_channels, -1)

    def places_of(member, first):
        return lax.dynamic_slice_in_dim(where.places[member], first * block, block)[:, channels].T

    def with_own(number, total):
        member, first, box = pairs.members[number, 0], pairs.blocks[number, 0], pairs.box[number]
        zero, y, x = corner(box)
        part = lax.dynamic_slice(own, (zero, zero, y, x), (len(own), num_channels, *window))
        part = part.reshape(len(own), num_channels, -1)
        product = jnp.einsum("acp,bcp->cab", tile(member, first, box), part, precision="highest")
        places = places_of(member, first)
        total = total.at[places[:, :, None], own_places].add(product)
        return total.at[own_places[:, None], places[:, None, :]].add(product.swapaxes(1, 2))

    def one(number, total):
        ends = list(zip(pairs.members[number], pairs.blocks[number], strict=True))
        first, second = (tile(*end, pairs.box[number]) for end in ends)
        product = jnp.einsum("acp,bcp->cab", first, second, precision="highest")
        rows, columns = (places_of(*end) for end in ends)
        total = total.at[rows[:, :, None], columns[:, None, :]].add(product)
        mirrored = jnp.where(number < pairs.num_single, 0.0, product.swapaxes(1, 2))
        return total.at[columns[:, :, None], rows[:, None, :]].add(mirrored)

    if len(own):
        total = lax.fori_loop(0, pairs.num_single, with_own, total)
    return lax.fori_loop(0, pairs.count, one, total)
