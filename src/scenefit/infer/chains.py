"""No-U-Turn chains of a `Target`, in steps that can be interrupted."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array
from numpyro.infer.hmc import hmc
from tqdm.auto import tqdm

from scenefit.arrays.compilation import compiled
from scenefit.infer.target import Target

CHUNK = 25
"""Draws of each chain between two looks at the progress bar and the keyboard."""


def _kernel(num_warmup: int, target: Target, key, start):
    """Return the initial state of a chain, and the function that moves it."""
    init_kernel, sample_kernel = hmc(potential_fn_gen=lambda target: target.potential, algo="NUTS")
    state = init_kernel(
        start,
        num_warmup,
        model_args=(target,),
        rng_key=key,
        # The coordinates are white already.
        adapt_mass_matrix=False,
        target_accept_prob=0.8,
        max_tree_depth=8,
    )
    return state, sample_kernel


@functools.cache
def _starter(num_warmup: int) -> Callable:
    """Return the compiled function that begins chains."""

    @compiled
    def begin(target, keys, starts):
        return jax.lax.map(lambda row: _kernel(num_warmup, target, *row)[0], (keys, starts))

    return begin


@functools.cache
def _mover(num_warmup: int) -> Callable:
    """Return the compiled function that moves chains by `CHUNK` transitions and returns where they have been."""

    @compiled
    def move(target, states):
        def chain(state):
            # Only the function is used; it knows the schedule of the warm-up.
            _, step = _kernel(num_warmup, target, state.rng_key, state.z)

            def transition(state, _):
                state = step(state, model_args=(target,))
                return state, (state.z, state.potential_energy, state.diverging)

            return jax.lax.scan(transition, state, None, length=CHUNK)

        return jax.lax.map(chain, states)

    return move


def run_chains(target: Target, key: Array, num_chains: int, num_warmup: int, num_samples: int, progress: bool):
    """Run No-U-Turn chains (Hoffman & Gelman 2014, JMLR 15, 1593) with adapted step sizes.

    Returns
    -------
    white : array, shape (chain, draw, m)
        Whitened coordinates.
    log_density : array, shape (chain, draw)
    divergent : float
        Fraction of transitions after the warm-up that diverged.
    is_complete : bool
        Whether all were drawn before an interruption.
    """
    first, second = jax.random.split(key)
    starts = jax.random.normal(first, (num_chains, len(target.center)), target.center.dtype)
    warmup = CHUNK * -(-num_warmup // CHUNK)
    chunks = -(-(warmup + num_samples) // CHUNK)
    parts, is_complete = [], True
    with tqdm(total=chunks * CHUNK, desc="NUTS", disable=not progress, unit="draw") as bar:
        try:
            states = _starter(warmup)(target, jax.random.split(second, num_chains), starts)
            for number in range(chunks):
                states, part = _mover(warmup)(target, states)
                part = jax.device_get(part)
                if number * CHUNK >= warmup:
                    parts.append(part)
                bar.update(CHUNK)
        except KeyboardInterrupt:
            is_complete = False
    if not parts:
        raise KeyboardInterrupt("interrupted before the first draw")
    white, energy, diverging = (
        np.concatenate(columns, axis=1)[:, :num_samples] for columns in zip(*parts, strict=True)
    )
    return white, -energy, float(np.mean(diverging)), is_complete
