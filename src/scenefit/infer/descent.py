"""Descent to the minimum of the quadratic model `1/2 |r + J d|^2` within bounds.

Conjugate gradients run over a face of coordinates that aren't held by a bound. Where the bounds cut their step, they go
on from there on a smaller face. All of it is one loop over products with J^T J, so that the rendering is compiled once.

(Alternating active-set choice and conjugate gradients: More & Toraldo 1991, SIAM J. Optim. 1, 93, doi:10.1137/0801008.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from scenefit.infer.problem import Problem, State, totals
from scenefit.infer.quadratic import (
    ConjugateIterate,
    above_zero,
    combine,
    conjugate_step,
    dot,
    on_face,
    select,
)

GAIN_MEMORY = 0.9
"""The recent gain of conjugate gradients is the largest of the last ones, each counted this much less than the next."""
MAX_ROUNDS, CLIPPED = 4, 0.05
"""Conjugate gradients go on from where the bounds cut their step, so many times in all, as long as what was cut off is more
than this fraction of the decrease."""


class Secant(eqx.Module):
    """What a step by the Hessian matrix expects, for comparison with the gradient at its end.

    All have shape (n,), along the problem's vector.

    Attributes
    ----------
    gradient : array
        Of the loss, at the beginning.
    step : array
    change : array
        The Hessian times the step: by how much the gradient should change.
    own : array
        What the coordinates of the same source contribute to that.
    stretch : array
        By how much the curvature of the loss along each source exceeds that of the Gauss-Newton Hessian, as far as is known.
    """

    gradient: Float[Array, " n"]
    step: Float[Array, " n"]
    change: Float[Array, " n"]
    own: Float[Array, " n"]
    stretch: Float[Array, " n"]


class Descent(eqx.Module):
    """Where a descent ended.

    Attributes
    ----------
    step : State
        From the state to the end; within bounds, but for coordinates that conjugate gradients moved last.
    face : State of bool
        What wasn't held by a bound.
    gradient, diagonal : State
        Gradient of the loss, and the estimated diagonal of its Hessian, at the state.
    decrement : float
        Decrease of the quadratic model.
    outstanding : float
        Decrease that as many iterations again would still have found at their recent gain.
    is_settled : bool
        Whether it ended because little was outstanding, not by the number of iterations.
    num_products : int
    secant : Secant or None
        What the next step learns from this one; None for conjugate gradients.
    """

    step: State
    face: State
    gradient: State
    diagonal: State
    decrement: Float[Array, ""]
    outstanding: Float[Array, ""]
    is_settled: Bool[Array, ""]
    num_products: Int[Array, ""]
    secant: Secant | None = None


class _Rounds(eqx.Module):
    """Rounds of conjugate gradients on their way: what one phase hands to the next."""

    phase: Int[Array, ""]
    number: Int[Array, ""]
    face: State
    iterate: ConjugateIterate
    iterations: Int[Array, ""]
    decrement: Float[Array, ""]
    gain: Float[Array, ""]

    def outstanding(self) -> Float[Array, ""]:
        """Return what as many iterations again would gain."""
        return self.iterations * self.gain

    def is_settled(self, fraction: Float[Array, ""]) -> Bool[Array, ""]:
        """Whether less is outstanding than this fraction of the decrease so far."""
        return self.outstanding() < fraction * self.decrement


class _Loop(eqx.Module):
    """Carry of the loop over products with J^T J: first the gradient, then the probes, then rounds of conjugate gradients."""

    count: Int[Array, ""]
    gradient: State
    curvature: Float[Array, " n"]
    rounds: _Rounds


_SET_UP, _RESTART, _ITERATE, _DONE = range(4)


@dataclasses.dataclass(frozen=True, eq=False)
class QuadraticModel:
    """The loss about a state to second order, damped; exists while a step is traced.

    Attributes
    ----------
    problem : Problem
    state : State
    product : callable
        `product(direction, w)` is J^T (J direction + w r) with the residuals r at the state, and the same of the priors.
    damping : float
        Of the Hessian, relative to its diagonal.
    curvature : array, shape (n,)
        Estimated diagonal of the Hessian for the vector coordinates; 0 to have it estimated.
    probes : array, shape (p, n)
        See `curvature_probes`.
    pixel_curvature : tuple of arrays
        See `image_curvature`.
    """

    problem: Problem
    state: State
    product: Callable[[State, Array], State]
    damping: Float[Array, ""]
    curvature: Float[Array, " n"]
    probes: Float[Array, "p n"]
    pixel_curvature: tuple[Float[Array, "_ *plane _ _"], ...]

    def descend(self, active: Bool[Array, ""], max_iterations: Int[Array, ""], settled: Float[Array, ""]) -> Descent:
        """Minimise the quadratic model within bounds; does nothing unless `active`.

        A round of conjugate gradients ends after `max_iterations`, or when as many iterations again as it took would, at
        their recent gain, lower the model by less than the fraction `settled` of what it has (Nash & Sofer 1990, Oper.
        Res. Lett. 9, 219, doi:10.1016/0167-6377(90)90067-C).
        """
        nothing, zero = jax.tree.map(jnp.zeros_like, self.state), jnp.zeros((), self.state.vector.dtype)
        none = jnp.zeros((), jnp.int32)
        phase = jnp.where(active, _SET_UP, _DONE).astype(jnp.int32)
        iterate = ConjugateIterate(nothing, nothing, nothing, zero)
        rounds = _Rounds(phase, none, self.problem.free, iterate, none, zero, zero)
        loop = _Loop(none, nothing, jnp.zeros_like(self.curvature), rounds)

        def body(loop: _Loop) -> _Loop:
            return self._advance(loop, max_iterations, settled)

        loop = lax.while_loop(lambda loop: loop.rounds.phase != _DONE, body, loop)
        return Descent(
            step=loop.rounds.iterate.step,
            face=loop.rounds.face,
            gradient=loop.gradient,
            diagonal=self._diagonal(loop),
            decrement=loop.rounds.decrement,
            outstanding=loop.rounds.outstanding(),
            is_settled=loop.rounds.is_settled(settled),
            num_products=loop.count,
        )

    def _num_probes(self) -> Int[Array, ""]:
        return jnp.where(jnp.max(self.curvature, initial=0.0) == 0, len(self.probes), 0)

    def _diagonal(self, loop: _Loop) -> State:
        estimate = jnp.where(self._num_probes() > 0, loop.curvature, self.curvature)
        return State(above_zero(estimate), self.pixel_curvature)

    def _preconditioner(self, loop: _Loop) -> State:
        return jax.tree.map(lambda d: d * (1 + self.damping), self._diagonal(loop))

    def _damped(self, result: State, loop: _Loop, direction: State) -> State:
        """Return the product with the damped Hessian from that with the Hessian."""
        return jax.tree.map(lambda r, d, v: r + self.damping * d * v, result, self._diagonal(loop), direction)

    def _advance(self, loop: _Loop, max_iterations, settled) -> _Loop:
        """Compute one product and use it for what the phase needs."""
        rounds, num_probes = loop.rounds, self._num_probes()
        first, setting_up, restarting = loop.count == 0, loop.count <= num_probes, rounds.phase == _RESTART
        probe = jnp.where(first, 0.0, self.probes[loop.count - 1])
        inner = select(restarting, rounds.iterate.step, rounds.iterate.direction)
        vector = jnp.where(setting_up, probe, inner.vector)
        images = tuple(jnp.where(setting_up, 0.0, d) for d in inner.images)
        result = self.product(State(vector, images), jnp.where(first | restarting, 1.0, 0.0))
        sample = jnp.where(setting_up & ~first, jnp.abs(probe * result.vector), 0.0)
        loop = _Loop(
            count=loop.count + 1,
            gradient=select(first, result, loop.gradient),
            curvature=loop.curvature + sample,
            rounds=self._iterate(loop, result),
        )
        rounds = loop.rounds
        exhausted = rounds.is_settled(settled) | (rounds.iterations >= max_iterations)
        ended = jnp.where(setting_up, loop.count > num_probes, exhausted)
        number = jnp.where(restarting, 2, jnp.where(ended, 1, 0))
        turns = (lambda _, rounds, __: rounds, self._bound, self._restart)
        return eqx.tree_at(lambda q: q.rounds, loop, lax.switch(number, turns, loop, rounds, result))

    def _iterate(self, loop: _Loop, result: State) -> _Rounds:
        """Take one conjugate-gradient iteration; does nothing in other phases."""
        rounds = loop.rounds
        iterating = rounds.phase == _ITERATE
        image = on_face(rounds.face, self._damped(result, loop, rounds.iterate.direction))
        following, gain = conjugate_step(rounds.iterate, image, self._preconditioner(loop), iterating)
        return _Rounds(
            phase=rounds.phase,
            number=rounds.number,
            face=rounds.face,
            iterate=following,
            iterations=rounds.iterations + iterating,
            decrement=rounds.decrement + gain,
            gain=jnp.maximum(gain, GAIN_MEMORY * rounds.gain),
        )

    def _bound(self, loop: _Loop, rounds: _Rounds, _) -> _Rounds:
        """Choose the face from a diagonal step, or end the step at the bounds and leave those it met out of the face.

        What isn't on the face goes to its bound, or the way of the diagonal step.
        """
        state, low, high, diagonal = self.state, self.problem.lowest, self.problem.highest, self._preconditioner(loop)
        first, step = rounds.phase == _SET_UP, rounds.iterate.step
        # Images count up to a factor: the part of their step that only scales them is left out.
        pairs = zip(step.images, state.images, strict=True)
        shaped = tuple(move - image * totals(move) for move, image in pairs)
        diagonal_step = jax.tree.map(jnp.divide, on_face(self.problem.free, loop.gradient), diagonal)
        wanted = select(first, diagonal_step, State(step.vector, shaped))
        end = combine(state, jnp.where(first, -1.0, 1.0), wanted)
        inside = jax.tree.map(lambda e, a, b: (e > a) & (e < b), end, low, high)
        cut = jax.tree.map(lambda e, a, b, x: jnp.clip(e, a, b) - x, end, low, high, state)
        step = jax.tree.map(lambda move, on: jnp.where(first & on, 0.0, move), cut, inside)
        excess = on_face(jax.tree.map(jnp.logical_not, inside), combine(wanted, -1.0, step))
        lost = 0.5 * dot(excess, jax.tree.map(jnp.multiply, self._diagonal(loop), excess))
        again = first | ((lost > CLIPPED * rounds.decrement) & (rounds.number < MAX_ROUNDS))
        return eqx.tree_at(
            lambda q: (q.phase, q.number, q.face, q.iterate.step),
            rounds,
            (
                jnp.where(again, _RESTART, _DONE).astype(jnp.int32),
                rounds.number + 1,
                jax.tree.map(lambda f, i: f & (i | ~again), rounds.face, inside),
                step,
            ),
        )

    def _restart(self, loop: _Loop, rounds: _Rounds, result: State) -> _Rounds:
        """Begin conjugate gradients with the gradient of the quadratic model at the present step."""
        step = rounds.iterate.step
        slope = self._damped(result, loop, step)
        remainder = on_face(rounds.face, jax.tree.map(jnp.negative, slope))
        direction = jax.tree.map(jnp.divide, remainder, self._preconditioner(loop))
        energy = dot(remainder, direction)
        return _Rounds(
            phase=jnp.asarray(_ITERATE, jnp.int32),
            number=rounds.number,
            face=rounds.face,
            iterate=ConjugateIterate(step, remainder, direction, energy),
            iterations=jnp.zeros((), jnp.int32),
            decrement=-0.5 * dot(step, combine(slope, 1.0, loop.gradient)),
            gain=energy,
        )
