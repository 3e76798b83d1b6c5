"""Point spread functions: known to the rest of scenefit by their transfer function alone.

A PSF says how the light of a point source falls on an observation's pixels, pixel response included. `transfer(0)` is the share
of it that the PSF describes: 1, or less for an image that was cut out of a larger one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import equinox as eqx
import numpy as np

from scenefit.arrays import fourier
from scenefit.sky import units

LEAST_ENCLOSED = 0.9
"""Images that sum to at least this, and at most 1, are taken to be cut out of a PSF of unit flux."""
EXTENT_TOLERANCE = 1e-4
"""Beyond its extent a PSF stays below this fraction of its peak."""


class AbstractPSF(eqx.Module):
    """Point spread function of one or more channels."""

    @property
    @abstractmethod
    def num_channels(self) -> int:
        """Number of channels; 1 also serves observations of any number of channels."""

    @property
    @abstractmethod
    def band_limit(self) -> float:
        """Frequency, in cycles per pixel along y or x, at and beyond which the transfer function is zero."""

    @property
    @abstractmethod
    def extent(self) -> float:
        """Radius, in pixels, outside which the PSF stays below `EXTENT_TOLERANCE` of its peak."""

    @property
    @abstractmethod
    def size(self) -> float:
        """Side, in pixels, of the stamp on which the PSF is given; 0 for an analytic one."""

    @property
    @abstractmethod
    def effective_sigma(self) -> np.ndarray:
        """Standard deviation, in pixels, of the Gaussian of equal peak value and flux; shape (channel,)."""

    @abstractmethod
    def transfer(self, ky: np.ndarray, kx: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """Evaluate the transfer function on a rectangle of frequencies of another grid.

        Parameters
        ----------
        ky, kx : arrays, shape (K,) and (L,)
            Frequencies in cycles per pixel of the other grid.
        affine : array, shape (2, 2)
            `d(y, x) on the other grid / d(y, x) on the PSF's pixels`.

        Returns
        -------
        array, shape (channel, K, L), complex
            `P(A^T k)`, with `P(0) = 1` and `P = 0` beyond the band limit.
        """


def mapped_frequencies(ky, kx, affine):
    """Return the frequencies A^T k in cycles per pixel of the PSF, two arrays of shape (K, L)."""
    qy = affine[0, 0] * ky[:, None] + affine[1, 0] * kx[None, :]
    qx = affine[0, 1] * ky[:, None] + affine[1, 1] * kx[None, :]
    return qy, qx


class GaussianPSF(AbstractPSF):
    """A round Gaussian, `exp(-2 pi^2 sigma^2 |q|^2)`, times the pixel response if asked for.

    Parameters
    ----------
    sigma : float or array, shape (channel,)
        Standard deviation in pixels, positive; a width on the sky must be divided by the pixel scale.
    integrate_pixel : bool
        Whether to convolve with a square pixel. Leave it off where `sigma` was measured on the image (it then
        holds the pixel's width already), turn it on where `sigma` describes optics and atmosphere alone.

    Raises
    ------
    ValueError
        If a `sigma` is not finite and positive, or is an angle.
    """

    sigma: np.ndarray
    integrate_pixel: bool = eqx.field(static=True)

    def __init__(self, sigma, *, integrate_pixel: bool = False):
        sigma = np.atleast_1d(units.to_pixels(sigma, "The sigma of a GaussianPSF (divide an angle by the pixel scale)"))
        if sigma.ndim != 1 or not (np.isfinite(sigma) & (sigma > 0)).all():
            raise ValueError(f"GaussianPSF wants a positive sigma (pixels) per channel; got {sigma}.")
        self.sigma = sigma
        self.integrate_pixel = integrate_pixel

    @property
    def num_channels(self) -> int:  # noqa: D102
        return len(self.sigma)

    @property
    def band_limit(self) -> float:  # noqa: D102
        return float(np.sqrt(np.log(1e8) / (2 * np.pi**2)) / self.sigma.min())

    @property
    def extent(self) -> float:  # noqa: D102
        return float(self.sigma.max() * np.sqrt(2 * np.log(1 / EXTENT_TOLERANCE))) + 0.5 * self.integrate_pixel

    @property
    def size(self) -> float:  # noqa: D102
        return 0.0

    @property
    def effective_sigma(self) -> np.ndarray:  # noqa: D102
        return np.sqrt(self.sigma**2 + self.integrate_pixel / 12)

    def transfer(self, ky, kx, affine):  # noqa: D102
        qy, qx = mapped_frequencies(ky, kx, affine)
        value = np.exp(-2 * np.pi**2 * self.sigma[:, None, None] ** 2 * (qy**2 + qx**2))
        if self.integrate_pixel:
            value = value * np.sinc(qy) * np.sinc(qx)
        return np.where(np.maximum(np.abs(qy), np.abs(qx)) < self.band_limit, value, 0.0).astype(complex)


class ImagePSF(AbstractPSF):
    """An image of a point source, per channel.

    Parameters
    ----------
    image : array, shape (channel, y, x) or (y, x)
        Samples, pixel response included. Slightly negative wings are fine.
    oversampling : int or float
        Samples per pixel of the observation, at least 1.
    center : None, "peak", "centroid" or (y, x)
        What counts as the position of the source, in samples of `image`: its middle (None; the image must then be
        odd-sized and brightest within a pixel of the middle), the peak (to a fraction of a pixel, from a parabola
        through the brightest sample and its neighbours), the flux-weighted mean, or a given place. The image is
        recentred exactly, by a phase in Fourier space.
    enclosed_flux : float or array, shape (channel,), optional
        Share of a point's flux that falls on the image; the rest counts as spread too widely to be seen. By default the sum of
        the image if that is between 0.9 and 1, as of one cut out of a PSF of unit flux, otherwise 1.

    Raises
    ------
    ValueError
        If the image has the wrong number of axes, holds NaN or infinities, has a sum that isn't positive, is
        even-sized or off-centre without `center`, if `oversampling` is below 1, or `enclosed_flux` isn't above 0 and at most 1.
    """

    image: np.ndarray
    oversampling: float = eqx.field(static=True)
    center: np.ndarray
    enclosed_flux: np.ndarray

    def __init__(self, image, *, oversampling: int | float = 1, center=None, enclosed_flux=None):
        image = np.array(units.as_numbers(image, "A PSF image"))
        if image.ndim == 2:
            image = image[None]
        if image.ndim != 3:
            raise ValueError(f"A PSF image wants shape (y, x) or (channel, y, x); got {image.shape}.")
        if not np.isfinite(image).all():
            bad = [c for c, plane in enumerate(image) if not np.isfinite(plane).all()]
            raise ValueError(f"The PSF image must be finite; channel(s) {bad} hold NaN or infinite values.")
        total = image.sum(axis=(1, 2))
        if (total <= 0).any():
            raise ValueError(f"The PSF image must have a positive sum in every channel; got sums {total}.")
        if not oversampling >= 1:
            raise ValueError(f"PSF oversampling must be at least 1 sample per pixel; got {oversampling}.")
        self.image = image / total[:, None, None]
        self.oversampling = float(oversampling)
        self.center = np.stack([_find_center(plane, center) for plane in self.image])
        if enclosed_flux is None:
            enclosed_flux = np.where((total >= LEAST_ENCLOSED) & (total <= 1), total, 1.0)
        self.enclosed_flux = np.broadcast_to(np.asarray(enclosed_flux, dtype=float), total.shape).copy()
        if not ((self.enclosed_flux > 0) & (self.enclosed_flux <= 1)).all():
            raise ValueError(f"The enclosed flux of a PSF image is above 0 and at most 1; got {enclosed_flux}.")

    @property
    def num_channels(self) -> int:  # noqa: D102
        return len(self.image)

    @property
    def band_limit(self) -> float:  # noqa: D102
        return 0.5 * self.oversampling

    @property
    def extent(self) -> float:  # noqa: D102
        y, x = np.mgrid[: self.image.shape[1], : self.image.shape[2]]
        offset = np.maximum(np.abs(y - self.center[:, 0, None, None]), np.abs(x - self.center[:, 1, None, None]))
        bright = np.abs(self.image) > EXTENT_TOLERANCE * self.image.max(axis=(1, 2), keepdims=True)
        return float(offset[bright].max() + 0.5) / self.oversampling

    @property
    def size(self) -> float:  # noqa: D102
        return max(self.image.shape[1:]) / self.oversampling

    @property
    def effective_sigma(self) -> np.ndarray:  # noqa: D102
        return np.sqrt(1 / (2 * np.pi * self.image.max(axis=(1, 2)))) / self.oversampling

    def transfer(self, ky, kx, affine):  # noqa: D102
        qy, qx = mapped_frequencies(ky, kx, affine)
        inside = np.maximum(np.abs(qy), np.abs(qx)) < self.band_limit * (1 - 1e-9)
        spacing = 1 / self.oversampling
        diagonal, crossed = abs(affine[0, 1]) + abs(affine[1, 0]), abs(affine[0, 0]) + abs(affine[1, 1])
        value = np.zeros((self.num_channels, *inside.shape), dtype=complex)
        for c, (plane, center) in enumerate(zip(self.image, self.center, strict=True)):
            if diagonal < 1e-9 * crossed:
                value[c] = fourier.sample_spectrum(plane, qy[:, 0], qx[0], center, spacing)
            elif crossed < 1e-9 * diagonal:
                value[c] = fourier.sample_spectrum(plane, qy[0], qx[:, 0], center, spacing).T
            else:
                value[c, inside] = fourier.sample_spectrum_nonuniform(plane, qy[inside], qx[inside], center, spacing)
        # At frequency 0 exactly, whatever the route: flux is conserved.
        value = np.where((qy == 0) & (qx == 0), 1.0, np.where(inside, value, 0.0))
        return self.enclosed_flux[:, None, None] * value


def _find_center(plane: np.ndarray, center) -> np.ndarray:
    """Return the position (y, x) that `center` names in one channel's PSF image."""
    peak = tuple(int(i) for i in np.unravel_index(np.argmax(plane), plane.shape))
    if center is None:
        middle = np.array([(n - 1) / 2 for n in plane.shape])
        if any(n % 2 == 0 for n in plane.shape) or np.abs(np.array(peak) - middle).max() > 1:
            raise ValueError(
                f"A PSF image must be odd-sized with its peak in the middle; got shape {plane.shape} with the peak at "
                f"(y, x) = ({peak[0]}, {peak[1]}). Say where its centre is: "
                "ImagePSF(image, center='peak'|'centroid'|(y, x))."
            )
        return middle
    if isinstance(center, str):
        if center == "peak":
            return np.array([_parabola_peak(np.take(plane, peak[1 - a], axis=1 - a), peak[a]) for a in (0, 1)])
        if center == "centroid":
            y, x = np.mgrid[: plane.shape[0], : plane.shape[1]]
            return np.array([(y * plane).sum(), (x * plane).sum()]) / plane.sum()
    else:
        position = units.to_pixels(center, "The centre of a PSF image")
        if position.shape == (2,) and (position > -0.5).all() and (position < np.array(plane.shape) - 0.5).all():
            return position
    raise ValueError(
        f"The centre of a PSF image is None, 'peak', 'centroid' or a position (y, x) on it; got {center!r}."
    )


def _parabola_peak(values: np.ndarray, index: int) -> float:
    """Return the vertex of the parabola through `values` at `index` and its two neighbours."""
    if not 0 < index < len(values) - 1:
        return float(index)
    below, middle, above = values[index - 1 : index + 2]
    return float(index + 0.5 * (below - above) / (below - 2 * middle + above))


def as_psf(psf) -> AbstractPSF:
    """Return `psf` itself if it is one, else the `ImagePSF` of an array.

    Raises
    ------
    TypeError
        If it is neither.
    """
    if isinstance(psf, AbstractPSF):
        return psf
    if not isinstance(psf, Sequence | np.ndarray) and not hasattr(psf, "__array__"):
        raise TypeError(f"A PSF is a GaussianPSF, an ImagePSF or an array of its image; got {psf!r}.")
    return ImagePSF(psf)
