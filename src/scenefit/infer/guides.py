"""Variational approximations ("guides") of a `Target`, fitted by maximising the evidence lower bound."""

from __future__ import annotations

import functools
from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float
from numpyro.distributions.flows import InverseAutoregressiveTransform
from numpyro.nn import AutoregressiveNN
from tqdm.auto import tqdm

from scenefit.arrays.compilation import compiled
from scenefit.infer.target import Target

CHUNK = 25
"""Steps between two looks at the progress bar and the keyboard."""
LEARNING_RATE, FINAL_RATE = 3e-2, 1e-3
"""At the start and at the end, in whitened coordinates."""
NUM_FLOWS = 2
"""Autoregressive transforms of a flow, the order of the coordinates reversed between them."""


class AbstractGuide(eqx.Module):
    """A distribution of whitened coordinates with parameters that can be fitted."""

    @abstractmethod
    def draw(self, key: Array) -> tuple[Float[Array, " m"], Float[Array, ""]]:
        """Return a draw and its log-density up to a constant, differentiable with respect to the guide's parameters."""

    @abstractmethod
    def draw_along_paths(self, key: Array) -> tuple[Float[Array, " m"], Float[Array, ""]]:
        """Return a draw and its log-density, of whose derivatives only that through the draw counts, if that is possible.

        The other part is zero in the mean and noise otherwise (Roeder et al. 2017, NeurIPS 30).
        """


class NormalGuide(AbstractGuide):
    """A multivariate normal, the unit one to begin with."""

    center: Float[Array, " m"]
    log_scale: Float[Array, " m"]
    lower: Float[Array, "m m"]

    def __init__(self, size: int, key: Array):
        self.center, self.log_scale, self.lower = jnp.zeros(size), jnp.zeros(size), jnp.zeros((size, size))

    def _root(self):
        return jnp.tril(self.lower, -1) + jnp.diag(jnp.exp(self.log_scale))

    def draw(self, key):  # noqa: D102
        noise = jax.random.normal(key, self.center.shape, self.center.dtype)
        return self.center + self._root() @ noise, -0.5 * jnp.sum(noise**2) - jnp.sum(self.log_scale)

    def draw_along_paths(self, key):  # noqa: D102
        white, _ = self.draw(key)
        fixed = lax.stop_gradient(self)
        noise = jax.scipy.linalg.solve_triangular(fixed._root(), white - fixed.center, lower=True)
        return white, -0.5 * jnp.sum(noise**2) - jnp.sum(fixed.log_scale)


class FlowGuide(AbstractGuide):
    """A multivariate normal after inverse autoregressive flows (Kingma et al. 2016, NeurIPS 29)."""

    normal: NormalGuide
    weights: tuple

    def __init__(self, size: int, key: Array):
        self.normal = NormalGuide(size, key)
        # Small weights: nearly the identity to begin with.
        keys = jax.random.split(key, NUM_FLOWS)
        self.weights = tuple(jax.tree.map(lambda w: 0.1 * w, _network(size)[0](each, (size,))[1]) for each in keys)

    def draw(self, key):  # noqa: D102
        white, log_density = self.normal.draw(key)
        for weights in self.weights:
            network = functools.partial(_network(len(white))[1], weights)
            flow = InverseAutoregressiveTransform(network)
            moved, intermediates = flow.call_with_intermediates(white)
            log_density = log_density - flow.log_abs_det_jacobian(white, moved, intermediates)
            white = moved[::-1]
        return white, log_density

    def draw_along_paths(self, key):  # noqa: D102
        return self.draw(key)


GUIDES = {"normal": NormalGuide, "flow": FlowGuide}
"""By the name that `sample` knows them by."""


@functools.cache
def _network(size: int):
    """Return the initialiser and the function of an autoregressive network."""
    return AutoregressiveNN(size, [max(size, 8)], skip_connections=False)


def fit_guide(
    target: Target, key: Array, kind: str, num_steps: int, num_particles: int, progress: bool
) -> tuple[AbstractGuide, np.ndarray, bool]:
    """Fit a guide by maximising the evidence lower bound (Kucukelbir et al. 2017, JMLR 18, 1), with Adam.

    Returns
    -------
    guide : AbstractGuide
    losses : array, shape (step,)
        Minus the bound, up to a constant.
    is_complete : bool
        Whether all steps were taken before an interruption.
    """
    first, *keys = jax.random.split(key, 1 + -(-num_steps // CHUNK))
    guide = GUIDES[kind](len(target.center), first)
    begin, move = _steps(num_steps, num_particles)
    state, losses, is_complete = begin(guide), [], True
    with tqdm(total=CHUNK * len(keys), desc="SVI", disable=not progress, unit="step") as bar:
        try:
            for each in keys:
                guide, state, loss = move(target, guide, state, each)
                losses.append(np.asarray(loss, dtype=float))
                bar.update(CHUNK)
                bar.set_postfix(loss=f"{losses[-1].mean():.6g}")
        except KeyboardInterrupt:
            is_complete = False
    return guide, np.concatenate(losses or [np.zeros(0)]), is_complete


@functools.cache
def _steps(num_steps: int, num_particles: int):
    """Return the functions that begin an optimisation and take `CHUNK` steps of it."""
    schedule = optax.exponential_decay(LEARNING_RATE, num_steps, FINAL_RATE / LEARNING_RATE)
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))

    def loss(guide, target, keys):
        def one(key):
            white, log_density = guide.draw_along_paths(key)
            return log_density + target.potential(white)

        return jnp.mean(lax.map(one, keys))

    @compiled
    def move(target, guide, state, key):
        def step(carry, key):
            guide, state = carry
            value, slope = jax.value_and_grad(loss)(guide, target, jax.random.split(key, num_particles))
            finite = jnp.isfinite(value) & jnp.all(
                jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(slope)])
            )
            slope = jax.tree.map(lambda g: jnp.where(finite, g, 0.0), slope)
            updates, state = optimizer.update(slope, state)
            return (optax.apply_updates(guide, updates), state), value

        (guide, state), losses = lax.scan(step, (guide, state), jax.random.split(key, CHUNK))
        return guide, state, losses

    return optimizer.init, move


@compiled
def guide_draws(guide: AbstractGuide, keys: Array) -> tuple[Float[Array, "n m"], Float[Array, " n"]]:
    """Return whitened draws of a guide, one a key, and their log-densities up to a constant."""
    return lax.map(guide.draw, keys)
