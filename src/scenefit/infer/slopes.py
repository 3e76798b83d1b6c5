"""Derivatives of the stamps of components along their parameters, by slot: all fluxes in the first, shapes in the others."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from scenefit.arrays.compilation import as_floats, compiled
from scenefit.arrays.stamps import add_stamps, first_indices
from scenefit.infer.problem import Problem, State


class StampSlopes(eqx.Module):
    """What the derivatives of a stack's components are made of, by slot: that of all fluxes first, those of shapes after it.

    Attributes
    ----------
    origin : array of int, shape (n, 2)
        First pixels of the stamps on the canvas.
    stamps : array, shape (slot, n, plane, h, w)
        In the first slot the stamps, then their derivatives along the elements' own coordinates.
    gains : array, shape (slot, n, channel)
        In the first slot what each channel shows of the entry of the spectrum that it shows, then the flux in every channel.
    """

    origin: Int[Array, "n 2"]
    stamps: Float[Array, "slot n plane h w"]
    gains: Float[Array, "slot n channel"]

    def add_to(
        self,
        canvas: Float[Array, "plane y x"],
        is_member: Bool[Array, " n"],
        slot: Int[Array, ""],
        cores: Int[Array, "n 4"] | None = None,
    ) -> Float[Array, "plane y x"]:
        """Add the stamps in a slot of some members to a canvas, or their cores alone; none if there is no such slot."""

        def add(member, canvas):
            stamp = lax.dynamic_index_in_dim(self.stamps[slot], member, keepdims=False)
            if cores is not None:
                first_row, last_row, first_column, last_column = cores[member]
                corner = zip(self.origin[member], stamp.shape[1:], strict=True)
                rows, columns = (first + jnp.arange(count) for first, count in corner)
                inside = ((rows >= first_row) & (rows < last_row))[:, None] & (columns >= first_column)
                stamp = jnp.where(inside & (columns < last_column), stamp, 0.0)
            start = first_indices(self.origin[member])
            block = lax.dynamic_slice(canvas, start, (len(canvas), *stamp.shape[1:]))
            return lax.dynamic_update_slice(canvas, block + stamp, start)

        def add_shown(member, canvas):
            # Few of many are members: the others take no time.
            return lax.cond(shown[member], add, lambda _, canvas: canvas, member, canvas)

        shown = is_member & (slot < len(self.stamps))
        return lax.fori_loop(0, len(shown), add_shown, canvas)


def slot_of_elements(problem: Problem) -> tuple[np.ndarray, list[int]]:
    """Return the slot of every element of a component's parameters, -1 for those of observations; and each stack's slots."""
    slot, counts = np.full(problem.index.shape, -1), [1] * len(problem.stacks)
    for leaf in problem.leaves:
        if leaf.kind != "stack":
            continue
        rows = leaf.elements()
        if leaf.name == "flux":
            slot[rows] = 0
        else:
            slot[rows] = counts[leaf.number] + np.arange(rows.shape[1])
            counts[leaf.number] += rows.shape[1]
    return slot, counts


def untied(problem: Problem, state: State) -> tuple[Problem, State]:
    """Return the problem and state with a coordinate of its own for every element."""
    numbers = jnp.arange(len(problem.index), dtype=problem.index.dtype)
    return eqx.tree_at(lambda p: p.index, problem, numbers), State(state.vector[problem.index], state.images)


def slopes_of_stamps(problem: Problem, state: State) -> list[StampSlopes]:
    """Return the derivatives of all stamps, one element of each component at a time, for every stack.

    Parameters
    ----------
    problem : Problem
        With a coordinate for every element (`untied`).
    state : State
    """
    slot, counts = slot_of_elements(problem)
    values, along_map = jax.linearize(problem.elements, state.vector)
    # Of all stacks together: elements along the coordinate of each slot.
    basis = jnp.asarray(slot == np.arange(1, max(counts, default=1))[:, None], state.vector.dtype)
    tangents = jax.vmap(along_map)(basis)
    stacks, _ = problem.with_elements(values, state.images)
    result = []
    for number, (stack, count) in enumerate(zip(stacks, counts, strict=True)):

        def stamps(elements, number=number):
            return problem.with_elements(elements, state.images)[0][number].stamps(problem.psf_sigma)

        value, along = jax.linearize(stamps, values)
        value = value[None]
        if count > 1:
            value = jnp.concatenate([value, jax.vmap(along)(tangents[: count - 1])])
        spectra = jnp.broadcast_to(stack.spectra, (count - 1, *stack.spectra.shape))
        result.append(StampSlopes(stack.origin, value, jnp.concatenate([stack.flux_gain[None], spectra])))
    return result


def blank_slopes(problem: Problem) -> list[StampSlopes]:
    """Return zeros in the shapes of `slopes_of_stamps`."""
    result = []
    for stack, count in zip(problem.stacks, slot_of_elements(problem)[1], strict=True):
        members, *shape = stack.mask.shape
        stamps = np.broadcast_to(0.0, (count, members, problem.canvas[0] if stack.bases else 1, *shape))
        gains = np.broadcast_to(0.0, (count, members, problem.canvas[0]))
        result.append(StampSlopes(stack.origin, as_floats(stamps), as_floats(gains)))
    return result


def model_canvas(problem: Problem, state: State, slopes: Sequence[StampSlopes]) -> Float[Array, "channel y x"]:
    """Return `Problem.model` from stamps that are known."""
    canvas = jnp.zeros(problem.canvas, state.vector.dtype)
    for stack, each in zip(problem.fill(state)[0], slopes, strict=True):
        canvas = add_stamps(canvas, stack.spectra, each.stamps[0], stack.origin)
    return canvas


@compiled
def stamp_slopes(problem: Problem, state: State) -> list[StampSlopes]:
    """Return the derivatives of all stamps, one element of each component at a time, for every stack."""
    return slopes_of_stamps(*untied(problem, state))
