"""The quadratic model of the loss about a state: its curvature, and conjugate gradients on it."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from scenefit.arrays.compilation import as_floats
from scenefit.arrays.stamps import add_stamps
from scenefit.infer.problem import Problem, State
from scenefit.model.morphology import AbstractImageMorphology

FLUX_CURVATURE = 10.0
"""Fluxes count by so many times the sum of their row of J^T J among fluxes, beside the generous bound on the curvature of
pixels."""


class ConjugateIterate(eqx.Module):
    """Preconditioned conjugate gradients on their way.

    Attributes
    ----------
    step : State
        Where they have come to.
    remainder : State
        Minus the gradient there.
    direction : State
        Where they go next.
    energy : float
        Inner product of the remainder and the preconditioned remainder.
    """

    step: State
    remainder: State
    direction: State
    energy: Float[Array, ""]


def conjugate_step(
    iterate: ConjugateIterate, image: State, preconditioner: State, active: Bool[Array, ""] | bool = True
) -> tuple[ConjugateIterate, Float[Array, ""]]:
    """Take an iteration of preconditioned conjugate gradients.

    Parameters
    ----------
    iterate : ConjugateIterate
    image : State
        The Hessian times the direction.
    preconditioner : State
        Diagonal.
    active : bool
        Whether to move at all.

    Returns
    -------
    iterate : ConjugateIterate
    gain : float
        Decrease of the quadratic model.
    """
    length = jnp.where(active, iterate.energy / jnp.maximum(dot(iterate.direction, image), 1e-30), 0.0)
    remainder = combine(iterate.remainder, -length, image)
    preconditioned = jax.tree.map(jnp.divide, remainder, preconditioner)
    energy = dot(remainder, preconditioned)
    following = ConjugateIterate(
        step=combine(iterate.step, length, iterate.direction),
        remainder=remainder,
        direction=combine(preconditioned, energy / jnp.maximum(iterate.energy, 1e-30), iterate.direction),
        energy=energy,
    )
    return following, 0.5 * length * iterate.energy


def curvature_probes(problem: Problem) -> Float[Array, "p n"]:
    """Return probes z of the diagonal of J^T J, which `|z (J^T J z)|` estimates: one for each kind of free coordinate.

    Fluxes, and each component of centers, shapes and shifts, are probed apart, since their curvatures differ by orders of
    magnitude. Fluxes are probed with equal signs, which gives the sum of their row of J^T J, a bound as that of
    `image_curvature`; the others with random signs, the same every time. Fluxes and backgrounds of different channels, and
    shifts of different observations, have nothing in common and share a probe.
    """
    free, index = np.asarray(problem.free.vector), np.asarray(problem.index)
    kinds: dict[tuple[str, int], list[np.ndarray]] = {}
    for leaf in problem.leaves:
        elements = leaf.elements()
        for entry in range(elements.shape[1]):
            kinds.setdefault((leaf.name, 0 if leaf.name in ("flux", "background") else entry), []).append(
                elements[:, entry]
            )
    rng = np.random.default_rng(0)
    probes = np.zeros((max(1, len(kinds)), len(free)))
    for probe, ((name, _), elements) in zip(probes, kinds.items(), strict=False):
        members = np.concatenate(elements)
        members = members[free[members] & (index[members] == members)]
        probe[members] = np.sqrt(FLUX_CURVATURE) if name == "flux" else rng.choice([-1.0, 1.0], size=len(members))
    return as_floats(probes)


def above_zero(curvature: Float[Array, " n"]) -> Float[Array, " n"]:
    """Return an estimated diagonal without zeros, which are coordinates that no data see."""
    return jnp.maximum(curvature, 1e-15 * jnp.max(curvature, initial=1e-20))


def image_curvature(problem: Problem, state: State) -> tuple[Float[Array, "m *plane h w"], ...]:
    """Return a diagonal that bounds J^T J for the values of all images from above (but for their scaling to unit sum).

    With `u_c = sum_s f_sc m_s` and `|R u|^2 <= lambda_c |u|^2`, the Cauchy-Schwarz inequality with weights f gives
    `D_s(p) = sum_c lambda_c f_sc sum_s' f_s'c` over the sources s' that cover pixel p; the morphology knows what follows for the
    values of which it makes its pixels.
    """
    stacks, _ = problem.fill(state)
    norm = jnp.zeros(problem.canvas[0], state.vector.dtype)
    for image in problem.images:
        steepest = image.noise.stiffness * image.noise.whiten(jnp.ones_like(image.data))
        heaviest = jnp.max(steepest**2, axis=(1, 2))
        norm = norm.at[np.array(image.renderer.channels)].add(
            image.renderer.norm * (image.gain * image.flux_scale) ** 2 * heaviest
        )
    cover = jnp.zeros(problem.canvas, state.vector.dtype)
    for stack in stacks:
        cover = add_stamps(cover, jnp.abs(stack.spectra), stack.mask[:, None].astype(cover.dtype), stack.origin)

    def one(row):
        morphology, origin, spectrum, mask = row
        start = (jnp.zeros_like(origin[0]), origin[0], origin[1])
        window = lax.dynamic_slice(cover, start, (cover.shape[0], *mask.shape))
        return morphology.curvature(jnp.einsum("c,cyx->yx", norm * jnp.abs(spectrum), window)) + 1e-20

    images = [stack for stack in stacks if isinstance(stack.morphology, AbstractImageMorphology)]
    data = [lax.map(one, (stack.morphology, stack.origin, stack.spectra, stack.mask)) for stack in images]
    return tuple(value + weight for value, (_, weight) in zip(data, problem.image_priors, strict=True))


def prior_terms(problem: Problem, state: State):
    """Return `Problem.potential`, its gradient along the vector and the diagonal of its Hessian (where positive).

    Of what the noise's parameters add to the loss, the curvature is the part that makes up the Fisher information.
    """
    vector = state.vector
    if not problem.has_potential:
        return jnp.zeros((), vector.dtype), jnp.zeros_like(vector), jnp.zeros_like(vector)
    value, slope = jax.value_and_grad(lambda at: problem.potential(State(at, state.images)))(vector)
    bend = -jax.jvp(jax.grad(problem.log_prior), (vector,), (jnp.ones_like(vector),))[1]
    return value, slope, jnp.maximum(bend, 0.0) + spread_curvature(problem, state)


def spread_curvature(problem: Problem, state: State) -> Float[Array, " n"]:
    """Return the diagonal of J^T J of `Problem.spreads`, in which no pixel depends on more than one coordinate."""
    vector = state.vector
    if not problem.has_spread:
        return jnp.zeros_like(vector)
    _, forward = jax.linearize(lambda at: problem.spreads(State(at, state.images)), vector)
    return jax.linear_transpose(forward, vector)(forward(jnp.ones_like(vector)))[0]


def dot(a, b) -> Float[Array, ""]:
    """Return the inner product of two trees of arrays."""
    products = [jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    return jnp.sum(jnp.stack(products))


def combine(a: State, factor, b: State) -> State:
    """Return a + factor * b."""
    return jax.tree.map(lambda x, y: x + factor * y, a, b)


def on_face(face: State, direction: State) -> State:
    """Return the direction with the coordinates off the face set to zero."""
    return jax.tree.map(lambda f, d: jnp.where(f, d, 0.0), face, direction)


def select(condition, yes, no):
    """Return `yes` or `no`, trees of arrays."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
