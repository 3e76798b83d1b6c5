"""The information J^T J of the free coordinates, from the derivatives of each component on its own footprint."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from scenefit.arrays import fourier
from scenefit.arrays.stamps import add_stamps
from scenefit.infer.footprints import Footprints, Pairs, own_leaves, slot_of_elements
from scenefit.infer.problem import Image, Problem, State
from scenefit.model.packing import Stack, transform_stacks


def information(problem: Problem, state: State, where: Footprints, kind: str = "score") -> Float[Array, "m m"]:
    """Return J^T J of the residuals along the free coordinates.

    Parameters
    ----------
    problem : Problem
    state : State
    where : Footprints
        Of the problem.
    kind : "score" or "fisher"
        Which residuals: see `Problem.residuals`.

    Returns
    -------
    array, shape (m, m)
        By `where.index`; as if no component moved a pixel outside its footprint. Quick footprints (`Footprints.is_quick`) take
        the noise of components as the same everywhere.
    """
    # Every element is a coordinate of its own here; those that are tied come together where the products are added up.
    problem, state = _untied(problem, state)
    size = len(where)
    total = jnp.zeros((size + 1, size + 1), state.vector.dtype)
    spectrum = transform_stacks(problem.fill(state)[0], problem.psf_sigma, problem.canvas)
    local, gains = _component_images(problem, state, where, kind, spectrum)
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


def _untied(problem: Problem, state: State) -> tuple[Problem, State]:
    """Return the problem and state with a coordinate for every element."""
    numbers = jnp.arange(len(problem.index), dtype=problem.index.dtype)
    vector = state.vector[problem.index]
    return eqx.tree_at(lambda p: p.index, problem, numbers), State(vector, state.images)


def _stamp_slopes(problem: Problem, state: State, where: Footprints):
    """Return, for each stack, the origins of its cores, and by slot what derivatives are made of: spectra and stamps.

    Returns
    -------
    list of (origins (n, 2), spectra (slot, n, channel), stamps (slot, n, plane, h, w))
    """
    slot, of_flux = slot_of_elements(problem)

    def stamps(vector):
        stacks = problem.fill(State(vector, state.images))[0]
        return [
            _core(*each).stamps(problem.psf_sigma) for each in zip(stacks, where.cores, where.core_sizes, strict=True)
        ]

    stacks = problem.fill(state)[0]
    values, along = jax.linearize(stamps, state.vector)
    basis = jnp.asarray(slot == np.arange(of_flux)[:, None], state.vector.dtype)
    slopes = jax.vmap(along)(basis) if of_flux else [jnp.zeros((0, *value.shape), value.dtype) for value in values]
    result = []
    for stack, first, value, slope in zip(stacks, where.cores, values, slopes, strict=True):
        spectra = jnp.concatenate(
            [jnp.broadcast_to(stack.spectra, (of_flux, *stack.spectra.shape)), stack.flux_gain[None]]
        )
        origins = stack.origin if first is None else first
        result.append((origins, spectra, jnp.concatenate([slope, value[None]])))
    return result


def _core(stack: Stack, first, size) -> Stack:
    """Return the stack with its stamps cut to `size` from `first` on."""
    if size is None:
        return stack
    cut = jax.vmap(lambda mask, start: lax.dynamic_slice(mask, start, size))(stack.mask, first - stack.origin)
    return eqx.tree_at(lambda s: (s.origin, s.mask), stack, (first, cut))


def _component_images(problem: Problem, state: State, where: Footprints, kind: str, spectrum):
    """Return the derivatives of the residuals along the slots of all components of a color together.

    Returns
    -------
    list of arrays, shape (color, slot, channel, y, x)
        One an observation: of components without a spectrum, one flux for all channels.
    array, shape (member, slot, channel)
        What their images have to be multiplied with.
    """
    parts = _stamp_slopes(problem, state, where)
    images = problem.fill(state)[1]
    render = [_along_spectrum(image.quick() if where.is_quick else image, kind, spectrum) for image in images]
    num_slots = len(parts[0][1])
    ends = np.cumsum([len(origins) for origins, _, _ in parts])
    # All channels show the same, unless shapes differ between them.
    planes = max(stamps.shape[2] for _, _, stamps in parts)

    def one(number):
        color, slot = number // num_slots, number % num_slots
        canvas = jnp.zeros((planes, *problem.canvas[1:]), state.vector.dtype)
        for (origins, _, stamps), end in zip(parts, ends, strict=True):
            members = where.color[end - len(origins) : end] == color
            shown = jnp.broadcast_to(members[:, None], (len(origins), planes)).astype(canvas.dtype)
            canvas = add_stamps(canvas, shown, stamps[slot], origins)
        modes = jnp.broadcast_to(fourier.transform(canvas), spectrum.shape)
        return [function(modes) for function in render]

    def step(visit, filled):
        number = where.visits[visit]
        return [images.at[number].set(image) for images, image in zip(filled, one(number), strict=True)]

    blank = [jnp.zeros((where.room * num_slots, *image.data.shape), image.data.dtype) for image in images]
    filled = lax.fori_loop(0, where.num_visits, step, blank)
    gains = jnp.concatenate([spectra.swapaxes(0, 1) for _, spectra, _ in parts])
    return [part.reshape(-1, num_slots, *part.shape[1:]) for part in filled], gains


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
    window = pairs.window

    def corner(box):
        zero = jnp.zeros_like(box[0])
        return zero, jnp.minimum(box[0], height - window[0]), jnp.minimum(box[2], width - window[1])

    def tile(member, box):
        zero, y, x = corner(box)
        cut = lax.dynamic_slice(images, (where.color[member], zero, zero, y, x), (1, num_slots, num_channels, *window))[
            0
        ]
        rows, columns = y + jnp.arange(window[0]), x + jnp.arange(window[1])
        inside = ((rows >= box[0]) & (rows < box[1]))[:, None] & (columns >= box[2]) & (columns < box[3])
        return jnp.where(inside, cut * gains[member][..., None, None], 0.0).reshape(num_slots, num_channels, -1)

    def with_own(number, total):
        member, box = pairs.members[number, 0], pairs.box[number]
        zero, y, x = corner(box)
        part = lax.dynamic_slice(own, (zero, zero, y, x), (len(own), num_channels, *window))
        part = part.reshape(len(own), num_channels, -1)
        product = jnp.einsum("acp,bcp->cab", tile(member, box), part, precision="highest")
        places = where.places[member][:, channels].T
        total = total.at[places[:, :, None], own_places].add(product)
        return total.at[own_places[:, None], places[:, None, :]].add(product.swapaxes(1, 2))

    def one(number, total):
        (first, second), box = pairs.members[number], pairs.box[number]
        product = jnp.einsum("acp,bcp->cab", tile(first, box), tile(second, box), precision="highest")
        rows, columns = (where.places[member][:, channels].T for member in (first, second))
        total = total.at[rows[:, :, None], columns[:, None, :]].add(product)
        mirrored = jnp.where(first == second, 0.0, product.swapaxes(1, 2))
        return total.at[columns[:, :, None], rows[:, None, :]].add(mirrored)

    if len(own):
        total = lax.fori_loop(0, pairs.num_single, with_own, total)
    return lax.fori_loop(0, pairs.count, one, total)
