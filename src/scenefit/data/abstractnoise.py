"""What every noise model knows: the distribution of the residuals of an observation."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scenefit.arrays.compilation import as_floats
from scenefit.data.nuisances import Nuisance


class AbstractNoise(eqx.Module):
    """Distribution of `data - model` over the pixels of an observation, shape (channel, y, x).

    Class attributes
    ----------------
    parameters : dict
        Parameters of the noise itself, by field name; shape (channel,).
    is_gaussian : bool
        Whether all its residuals are the whitened one.
    host_only : tuple of str
        Fields that only the host needs.
    """

    parameters: ClassVar[dict[str, Nuisance]]
    is_gaussian: ClassVar[bool]
    host_only: ClassVar[tuple[str, ...]]

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
    def deviance_residual(self, residual: Float[Array, "channel y x"]) -> Float[Array, "channel y x"]:
        """Return the signed root of the deviance of `model - data`: half its square is the loss of a pixel.

        For Gaussian noise the whitened residual.
        """

    @abstractmethod
    def score_residual(self, residual: Float[Array, "channel y x"]) -> Float[Array, "channel y x"]:
        """Return a residual of `model - data` for Gauss-Newton steps.

        With its Jacobian J, J^T times it is the gradient of the loss of the pixels, and J^T J a bound of the Hessian.
        (Iteratively reweighted least squares, Holland & Welsch 1977, Commun. Stat. A 6, 813, doi:10.1080/03610927708827533.)
        """

    @abstractmethod
    def fisher_residual(self, residual: Float[Array, "channel y x"]) -> Float[Array, "channel y x"]:
        """Return a residual of which J^T J is the Fisher information of the pixels about the model."""

    @property
    @abstractmethod
    def stiffness(self) -> float | Float[Array, "channel 1 1"]:
        """Largest slope of the deviance residual in units of that of a constant when whitened, for models near the data."""

    @abstractmethod
    def log_normalization(self) -> float:
        """Return the log-likelihood where `deviance_residual` is zero.

        For Gaussian noise, minus half the log-determinant of 2 pi times the covariance. It counts the pixels with
        information alone, and is summed on the host in float64, so that weights of any unit pass: the noise must not be
        traced by JAX. `whiten` and `chi_square` may be.
        """

    @abstractmethod
    def log_spread(self) -> Float[Array, "..."]:
        """Return the part of minus `log_normalization` that depends on the parameters of the noise.

        One number a pixel, or nothing but 0 if there are no parameters. May be traced by JAX.
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

    @abstractmethod
    def independent(self) -> tuple[AbstractNoise, np.ndarray | None]:
        """Return the noise of pixels that were independent, and how they are correlated on the average.

        Returns
        -------
        AbstractNoise
            With the same parameters.
        array, shape (channel, 2 R + 1, 2 R + 1), or None
            Correlation with pixels (dy, dx) away; None if they are independent.
        """

    @property
    @abstractmethod
    def reach(self) -> int:
        """By how many rows or columns a whitened pixel may be away from the residuals that it is made of."""

    @property
    @abstractmethod
    def modes(self) -> np.ndarray:
        """Which whitened pixels are independent numbers; bool, shape (channel, y, x)."""

    def num_modes(self) -> np.ndarray:
        """Return how many independent numbers the data of each channel are worth, shape (channel,): the mean of chi-square."""
        return self.modes.sum(axis=(1, 2))

    def on_device(self) -> AbstractNoise:
        """Return the noise as JAX arrays, without what only the host needs: with it, residuals alone can be had."""
        kept = self
        for name in self.host_only:
            kept = eqx.tree_at(lambda noise, name=name: getattr(noise, name), kept, None)
        return jax.tree.map(as_floats, kept)

    def chi_square(self, residual: Float[Array, "channel y x"]) -> Float[Array, " channel"]:
        """Return the sum of squared whitened residuals of each channel."""
        return jnp.sum(self.whiten(residual) ** 2, axis=(1, 2))

    def log_likelihood(self, residual: Float[Array, "channel y x"]) -> Float[Array, ""]:
        """Return the log-density of the residual (model minus data), normalised over the valid pixels.

        The residual may be traced by JAX, the noise not (see `log_normalization`).
        """
        return self.log_normalization() - 0.5 * jnp.sum(self.deviance_residual(residual) ** 2)


class AbstractGaussianNoise(AbstractNoise):
    """Noise whose residuals are all the whitened one."""

    is_gaussian: ClassVar = True

    def deviance_residual(self, residual):  # noqa: D102
        return self.whiten(residual)

    def score_residual(self, residual):  # noqa: D102
        return self.whiten(residual)

    def fisher_residual(self, residual):  # noqa: D102
        return self.whiten(residual)
