"""Inverse variances of pixels, 0 for those without information, and what follows from them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def as_weights(weights):
    """Return weights as they are if they are a JAX array, else checked, as an array of float64."""
    if isinstance(weights, jax.Array):
        return weights
    weights = np.asarray(weights, dtype=float)
    _check_weights(weights)
    return weights


def as_positive(value, count, what):
    """Return a value as it is if it is a JAX array, else checked, as one float64 for each of `count` channels."""
    if isinstance(value, jax.Array):
        return value
    value = np.asarray(value, dtype=float)
    if value.shape not in ((), (1,), (count,)) or not (np.isfinite(value) & (value > 0)).all():
        raise ValueError(f"{what}, or one for each of {count} channels; got {value}.")
    return np.broadcast_to(value, (count,)).copy()


def level_of(weights) -> np.ndarray:
    """Return the median standard deviation of each channel; 1 without information."""
    planes = np.asarray(weights, dtype=float)
    return np.array([1 / np.sqrt(np.median(w[w > 0])) if (w > 0).any() else 1.0 for w in planes])


def sigma_of(weights) -> Array:
    """Return the standard deviation of each pixel; 0 without information."""
    valid = np.asarray(weights) > 0
    return jnp.asarray(np.sqrt(np.where(valid, 1 / np.where(valid, weights, 1.0), 0.0)))


def gaussian_log_normalization(weights) -> float:
    """Return the log-density of independent Gaussian noise at zero."""
    weights = np.asarray(weights, dtype=float)
    return float(0.5 * np.sum(np.log(weights[weights > 0] / (2 * np.pi))))


def scaled_weights(weights, unit) -> np.ndarray:
    """Return the weights of data divided by `unit`, shape (channel,)."""
    return np.asarray(weights, dtype=float) * np.asarray(unit, dtype=float)[:, None, None] ** 2


def restricted_weights(weights, keep, window) -> np.ndarray:
    """Return the weights of a window, 0 where `keep` is False."""
    return np.where(keep, np.asarray(weights)[(slice(None), *window)], 0.0)


def _check_weights(weights: np.ndarray):
    """Raise ValueError unless all weights are finite and at least 0."""
    for kind, bad in (("NaN", np.isnan(weights)), ("infinite", np.isinf(weights)), ("negative", weights < 0)):
        if bad.any():
            where = np.unravel_index(np.argmax(bad), bad.shape)
            raise ValueError(
                f"Weights (inverse variances) must be finite and >= 0; got {int(bad.sum())} {kind} value(s), the first "
                f"at (channel, y, x) = {tuple(int(i) for i in where)}. Use weight 0 or mask= for pixels without "
                "information."
            )


def spread_of_scale(informative, scale) -> Array:
    """Return by how much a factor of all standard deviations adds to the loss of each pixel where `informative` isn't 0."""
    return jnp.where(jnp.asarray(informative) > 0, jnp.log(jnp.asarray(scale))[:, None, None], 0.0)
