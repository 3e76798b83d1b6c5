"""Derivatives of the stamps of components along their parameters, by slot: all fluxes in the first, shapes in the others."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from scenefit.arrays.compilation import compiled
from scenefit.infer.problem import Problem, State
from scenefit.model.packing import Stack


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
        self, canvas: Float[Array, "plane y x"], is_member: Bool[Array, " n"], slot: Int[Array, ""]
    ) -> Float[Array, "plane y x"]:
        """Add the stamps in a slot of some members to a canvas; none if there is no such slot."""

        def add(member, canvas):
            stamp = lax.dynamic_index_in_dim(self.stamps[slot], member, keepdims=False)
            y, x = self.origin[member]
            start = jnp.zeros_like(y), y, x
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


def slopes_of_stamps(
    problem: Problem, state: State, cores: Sequence | None = None, core_sizes: Sequence | None = None
) -> list[StampSlopes]:
    """Return the derivatives of all stamps, or of their cores, one element of each component at a time, for every stack.

    Parameters
    ----------
    problem : Problem
        With a coordinate for every element (`untied`).
    state : State
    cores, core_sizes : tuple, optional
        Those of `Footprints`.
    """
    slot, counts = slot_of_elements(problem)
    result = []
    for number, count in enumerate(counts):
        first = None if cores is None else cores[number]
        size = None if core_sizes is None else core_sizes[number]

        def stamps(vector, number=number, first=first, size=size):
            stack = problem.fill(State(vector, state.images))[0][number]
            return _core(stack, first, size).stamps(problem.psf_sigma)

        own = np.zeros(len(slot), bool)
        for leaf in problem.leaves:
            own[leaf.start : leaf.stop] |= leaf.kind == "stack" and leaf.number == number
        value, along = jax.linearize(stamps, state.vector)
        basis = jnp.asarray((slot == np.arange(1, count)[:, None]) & own, state.vector.dtype)
        slopes = jax.vmap(along)(basis) if count > 1 else jnp.zeros((0, *value.shape), value.dtype)
        stack = problem.fill(state)[0][number]
        spectra = jnp.broadcast_to(stack.spectra, (count - 1, *stack.spectra.shape))
        result.append(
            StampSlopes(
                stack.origin if first is None else first,
                jnp.concatenate([value[None], slopes]),
                jnp.concatenate([stack.flux_gain[None], spectra]),
            )
        )
    return result


@compiled
def stamp_slopes(problem: Problem, state: State) -> list[StampSlopes]:
    """Return the derivatives of all stamps, one element of each component at a time, for every stack."""
    return slopes_of_stamps(*untied(problem, state))


def padded_gains(slopes: list[StampSlopes], num_slots: int) -> Float[Array, "member slot channel"]:
    """Return the gains of all members, through all stacks, with so many slots."""
    rows = [jnp.pad(each.gains, ((0, num_slots - len(each.gains)), (0, 0), (0, 0))) for each in slopes]
    return jnp.concatenate([row.swapaxes(0, 1) for row in rows])


def _core(stack: Stack, first, size) -> Stack:
    """Return the stack with its stamps cut to `size` from `first` on."""
    if size is None:
        return stack
    cut = jax.vmap(lambda mask, start: lax.dynamic_slice(mask, start, size))(stack.mask, first - stack.origin)
    return eqx.tree_at(lambda s: (s.origin, s.mask), stack, (first, cut))
