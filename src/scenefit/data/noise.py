"""Noise models: what the residuals of an observation are compared with."""

from __future__ import annotations

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class AbstractNoise(eqx.Module):
    """Distribution of `data - model` over the pixels of an observation, shape (channel, y, x)."""

    @property
    @abstractmethod
    def valid(self) -> np.ndarray:
        """Which pixels carry information; bool, shape (channel, y, x)."""

    @abstractmethod
    def level(self) -> np.ndarray:
        """Return the typical standard deviation of a pixel, shape (channel,); 1 for channels without information."""

    @abstractmethod
    def whiten(self, residual: Float[Array, "channel y x"]) -> Float[Array, "channel y x"]:
        """Return the residual in independent units of its standard deviation; 0 where there is no information."""

    @abstractmethod
    def log_normalization(self) -> float:
        """Return the log-likelihood of a zero residual: minus half the log-determinant of 2 pi times the covariance.

        It counts the pixels with information alone, and is summed on the host in float64, so that weights of any unit pass:
        the noise must not be traced by JAX. `whiten` and `chi_square` may be.
        """

    @abstractmethod
    def sample(self, key: Array) -> Float[Array, "channel y x"]:
        """Draw noise; 0 where there is no information."""

    @abstractmethod
    def scaled(self, unit: np.ndarray) -> AbstractNoise:
        """Return the noise of the data divided by `unit`, shape (channel,)."""

    @abstractmethod
    def restricted(self, keep: np.ndarray, window: tuple[slice, slice]) -> AbstractNoise:
        """Return the noise of the pixels in `window`, without information where `keep` (y, x there) is False."""

    def chi_square(self, residual: Float[Array, "channel y x"]) -> Float[Array, " channel"]:
        """Return the sum of squared whitened residuals of each channel."""
        return jnp.sum(self.whiten(residual) ** 2, axis=(1, 2))

    def log_likelihood(self, residual: Float[Array, "channel y x"]) -> Float[Array, ""]:
        """Return the log-density of the residual, normalised over the valid pixels.

        The residual may be traced by JAX, the noise not (see `log_normalization`).
        """
        return self.log_normalization() - 0.5 * jnp.sum(self.chi_square(residual))


class WhiteNoise(AbstractNoise):
    """Independent Gaussian noise, `log L = -1/2 sum_j [w_j r_j^2 - log(w_j / 2 pi)]` over pixels with `w_j > 0`.

    Parameters
    ----------
    weights : array, shape (channel, y, x)
        Inverse variances; 0 means no information.

    Raises
    ------
    ValueError
        If a weight is negative, NaN or infinite.
    """

    weights: np.ndarray | Array

    def __init__(self, weights):
        if not isinstance(weights, jax.Array):
            weights = np.asarray(weights, dtype=float)
            _check_weights(weights)
        self.weights = weights

    @property
    def valid(self) -> np.ndarray:  # noqa: D102
        return np.asarray(self.weights) > 0

    def level(self) -> np.ndarray:  # noqa: D102
        planes = np.asarray(self.weights, dtype=float)
        return np.array([1 / np.sqrt(np.median(w[w > 0])) if (w > 0).any() else 1.0 for w in planes])

    def whiten(self, residual):  # noqa: D102
        return jnp.sqrt(self.weights) * residual

    def log_normalization(self) -> float:  # noqa: D102
        weights = np.asarray(self.weights, dtype=float)
        return float(0.5 * np.sum(np.log(weights[weights > 0] / (2 * np.pi))))

    def sample(self, key):  # noqa: D102
        sigma = jnp.asarray(np.sqrt(np.where(self.valid, 1 / np.where(self.valid, self.weights, 1.0), 0.0)))
        return sigma * jax.random.normal(key, sigma.shape, sigma.dtype)

    def scaled(self, unit):  # noqa: D102
        return WhiteNoise(np.asarray(self.weights, dtype=float) * np.asarray(unit, dtype=float)[:, None, None] ** 2)

    def restricted(self, keep, window):  # noqa: D102
        return WhiteNoise(np.where(keep, np.asarray(self.weights)[(slice(None), *window)], 0.0))


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
