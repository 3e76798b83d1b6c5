"""Morphologies: how the light of a component is spread over model pixels, normalised to unit total."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.distributions import constraints

from scenefit.model.parameters import unit_disk

HALF_LIGHT_PER_SIGMA = float(np.sqrt(2 * np.log(2)))
"""Half-light radius of a Gaussian in units of its standard deviation."""
STAMP_FLUX_TOLERANCE = 1e-5
"""Fraction of a profile's flux that may fall outside its stamp."""
RINGING_EXTENT, RINGING_FADE = 1.6, 5.0
"""Pixels over which a point's ringing is kept beyond its core, and then fades: with an observed PSF of sigma 1 pixel and
more it is drawn to 1e-3 of its peak."""


class AbstractMorphology(eqx.Module):
    """Shape of a component on the model frame, already convolved with the model PSF.

    Class attributes
    ----------------
    constraints : dict
        numpyro constraint of every parameter, by field name. Fields that aren't listed aren't parameters.
    """

    constraints: ClassVar[dict[str, constraints.Constraint]]

    @abstractmethod
    def evaluate(
        self, y: Float[Array, " h"], x: Float[Array, " w"], psf_sigma: Float[Array, ""]
    ) -> Float[Array, "h w"]:
        """Evaluate on a grid of pixels.

        Parameters
        ----------
        y, x : arrays, shape (h,) and (w,)
            Pixel coordinates relative to the source's centre.
        psf_sigma : float
            Standard deviation of the Gaussian model PSF, pixels.

        Returns
        -------
        array, shape (h, w)
            Flux per pixel; sums to 1 over an infinite grid.
        """

    @abstractmethod
    def radius(self, psf_sigma: float) -> float:
        """Return the half-size, in pixels, of a stamp that holds all but `STAMP_FLUX_TOLERANCE` of the flux."""


class PointMorphology(AbstractMorphology):
    """A point: the model PSF, band-limited.

    Samples of a Gaussian as narrow as the model PSF hold aliases: a tenth of its spectrum's peak is left at the Nyquist
    frequency. A point has these frequencies cut off instead, `b(y) = int_{-1/2}^{1/2} exp(-2 pi^2 sigma^2 k^2 + 2 pi i k y) dk`
    along each axis, with the ringing that follows from the cut faded out over `RINGING_FADE` pixels.
    """

    constraints: ClassVar = {}

    def evaluate(self, y, x, psf_sigma):  # noqa: D102
        return _band_limited(y, psf_sigma)[:, None] * _band_limited(x, psf_sigma)

    def radius(self, psf_sigma: float) -> float:  # noqa: D102
        return _ringing_radius(psf_sigma) + RINGING_FADE


class GaussianMorphology(AbstractMorphology):
    """An elliptical Gaussian.

    Parameters
    ----------
    half_light_radius : float
        Radius, in model pixels, of the ellipse that holds half the light, before the PSF: the geometric mean of its
        semi-axes. (The semi-major axis is `half_light_radius / sqrt(q)`; it isn't smooth where q = 1.)
    ellipticity : array, shape (2,)
        `(1 - q^2) / (1 + q^2) * (cos 2 theta, sin 2 theta)` with axis ratio q and theta counter-clockwise from +x.
    """

    half_light_radius: np.ndarray | Array
    ellipticity: np.ndarray | Array
    constraints: ClassVar = {"half_light_radius": constraints.positive, "ellipticity": unit_disk}

    def __init__(self, half_light_radius, ellipticity=(0.0, 0.0)):
        self.half_light_radius = _as_array(half_light_radius, ())
        self.ellipticity = _as_array(ellipticity, (2,))

    def evaluate(self, y, x, psf_sigma):  # noqa: D102
        xx, yy, xy = _second_moments(self.half_light_radius / HALF_LIGHT_PER_SIGMA, self.ellipticity)
        return _gaussian(y, x, yy + psf_sigma**2, xx + psf_sigma**2, xy)

    def radius(self, psf_sigma: float) -> float:  # noqa: D102
        norm = float(np.hypot(*np.asarray(self.ellipticity)))
        major = float(self.half_light_radius) / HALF_LIGHT_PER_SIGMA * ((1 + norm) / (1 - norm)) ** 0.25
        return float(np.hypot(major, psf_sigma) * _TRUNCATION)


class PixelMorphology(AbstractMorphology):
    """A free image of non-negative model pixels, as it appears through the model PSF; scaled to unit sum.

    Parameters
    ----------
    image : array, shape (h, w)
        Flux per model pixel.
    anchor : (int, int), optional
        Pixel (y, x) of the image that lies on the model pixel nearest to the source's centre; its middle by default.
    envelope : array, shape (h, w), optional
        Smooth, non-negative guess of the image, scaled to unit sum. `Parameters.default` gives every pixel a normal
        prior around it whose width is proportional to it: where the data say little, the image stays smooth and
        doesn't soak up noise or a neighbour's light.

    Raises
    ------
    ValueError
        If the image isn't two-dimensional, not finite or sums to nothing.
    """

    image: np.ndarray | Array
    envelope: np.ndarray | None
    anchor: tuple[int, int] = eqx.field(static=True)
    constraints: ClassVar = {"image": constraints.nonnegative}

    def __init__(self, image, anchor: tuple[int, int] | None = None, envelope=None):
        image = np.asarray(image, dtype=float)
        if image.ndim != 2 or not np.isfinite(image).all() or not image.sum() > 0:
            raise ValueError(
                f"PixelMorphology wants a finite image (y, x) with a positive sum; got shape {image.shape}"
                + (f", sum {image.sum():.3g}." if image.ndim == 2 else ".")
            )
        self.image = image / image.sum()
        self.envelope = None if envelope is None else _as_envelope(envelope, image.shape)
        self.anchor = (image.shape[0] // 2, image.shape[1] // 2) if anchor is None else (int(anchor[0]), int(anchor[1]))

    def evaluate(self, y, x, psf_sigma):  # noqa: D102
        return jnp.asarray(self.image)

    def padded(self, shape: tuple[int, int], offset: tuple[int, int]) -> PixelMorphology:
        """Return the image placed at rows and columns `offset` onwards of a larger stamp of zeros."""
        image = np.zeros(shape)
        height, width = self.image.shape
        image[offset[0] : offset[0] + height, offset[1] : offset[1] + width] = self.image
        return PixelMorphology(image, anchor=(0, 0))

    def radius(self, psf_sigma: float) -> float:  # noqa: D102
        return max(self.image.shape) / 2


_TRUNCATION = float(np.sqrt(-2 * np.log(STAMP_FLUX_TOLERANCE)))


def _as_envelope(envelope, shape):
    """Return an envelope of unit sum."""
    envelope = np.asarray(envelope, dtype=float)
    if envelope.shape != shape or not np.isfinite(envelope).all() or envelope.min() < 0 or not envelope.sum() > 0:
        raise ValueError(
            f"An envelope is finite, non-negative and not zero, with the shape {shape} of the image; got {envelope.shape}."
        )
    return envelope / envelope.sum()


def _as_array(value, shape):
    """Return a parameter as an array of the given shape."""
    value = value if isinstance(value, Array) else np.asarray(value, dtype=float)
    if value.shape != shape:
        raise ValueError(f"Expected a parameter of shape {shape}; got {value.shape}.")
    return value


def _second_moments(sigma, ellipticity):
    """Return the moments (xx, yy, xy) of an ellipse whose semi-axes have the geometric mean `sigma`."""
    # With e = (1 - q^2) / (1 + q^2) and a b = sigma^2, the mean of a^2 and b^2 is sigma^2 / sqrt(1 - e^2).
    mean = sigma**2 / jnp.sqrt(1 - jnp.sum(jnp.asarray(ellipticity) ** 2))
    return mean * (1 + ellipticity[0]), mean * (1 - ellipticity[0]), mean * ellipticity[1]


_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(40)
_AROUND = np.arange(-32, 33)


def _ringing_radius(psf_sigma):
    """Return the distance, in pixels, up to which a point's ringing is kept."""
    return psf_sigma * _TRUNCATION + RINGING_EXTENT


def _band_limited(offset, psf_sigma):
    """Evaluate a Gaussian of unit sum without frequencies beyond Nyquist at offsets from its centre, one pixel apart."""
    offset = jnp.asarray(offset)
    frequency, flat = _NODES / 4 + 0.25, _ringing_radius(psf_sigma)
    amplitude = 0.5 * _NODE_WEIGHTS * jnp.exp(-2 * (jnp.pi * psf_sigma * frequency) ** 2)

    def kernel(at):
        fade = jnp.clip((jnp.abs(at) - flat) / RINGING_FADE, 0.0, 1.0)
        return jnp.cos(2 * jnp.pi * at[:, None] * frequency) @ amplitude * jnp.cos(0.5 * jnp.pi * fade) ** 2

    # The sum over all pixels, however few of them the stamp has.
    fraction = offset[0] - jnp.round(offset[0])
    return kernel(offset) / jnp.sum(kernel(fraction + _AROUND))


def _gaussian(y, x, yy, xx, xy):
    """Evaluate a Gaussian of unit integral with second moments yy, xx, xy on the grid y x x."""
    determinant = yy * xx - xy**2
    y = jnp.asarray(y)[:, None]
    exponent = (xx * y**2 - 2 * xy * y * x + yy * x**2) / determinant
    return jnp.exp(-0.5 * exponent) / (2 * jnp.pi * jnp.sqrt(determinant))
