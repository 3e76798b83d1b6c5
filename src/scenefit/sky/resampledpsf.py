"""Lanczos kernels that put an image onto other pixels, and the PSF of the image that comes out."""

from __future__ import annotations

import equinox as eqx
import numpy as np
from numpy.polynomial import Chebyshev

from scenefit.arrays.fourier import coarse_fast_length
from scenefit.sky.psf import EXTENT_TOLERANCE, AbstractPSF, as_psf, mapped_frequencies

ORDERS = (2, 3, 4, 5)
"""Zeros of the kernel on either side: with fewer it blurs, with more it rings further."""
NUM_NODES = 20
"""Gauss-Legendre nodes for each smooth piece of a kernel, at most one pixel long, and 4 more for every cycle per pixel: exact
to rounding."""


def check_order(order) -> int:
    """Return the order of a Lanczos kernel.

    Raises
    ------
    ValueError
        If it isn't one of `ORDERS`.
    """
    if isinstance(order, bool) or order not in ORDERS:
        raise ValueError(f"The order of a Lanczos kernel is one of {ORDERS}; got {order!r}.")
    return int(order)


def lanczos(distance: np.ndarray, order: int) -> np.ndarray:
    """Evaluate `sinc(x) sinc(x / a)`, which is 0 from `|x| = a` on, with `a` the order and x in pixels.

    C. E. Duchon 1979, J. Appl. Meteorol. 18, 1016, doi:10.1175/1520-0450(1979)018<1016:LFIOAT>2.0.CO;2.
    """
    return np.where(np.abs(distance) < order, np.sinc(distance) * np.sinc(distance / order), 0.0)


def normalized_kernel(distance: np.ndarray, order: int, width: float) -> np.ndarray:
    """Evaluate the kernel whose values one pixel apart sum to 1, `K(x / w) / sum_n K((x + n) / w)`.

    Normalising the weights of each position to sum 1 amounts to using this kernel: the sum repeats with every pixel.
    Its integral is 1, and its Fourier transform is 0 at every other whole number of cycles per pixel.

    Parameters
    ----------
    distance : array
        From a native pixel, in native pixels.
    order : int
        Of the Lanczos kernel K.
    width : float
        Native pixels between the zeros of K, at least 1.
    """
    distance = np.asarray(distance, float)
    reach = int(np.ceil(order * width))
    total = sum(lanczos((distance - np.floor(distance) + n) / width, order) for n in range(-reach - 1, reach + 1))
    return lanczos(distance / width, order) / total


def kernel_transform(frequency: np.ndarray, order: int, width: float) -> np.ndarray:
    """Evaluate the Fourier transform of `normalized_kernel`, `2 int_0^(a w) k(x) cos(2 pi q x) dx`.

    Parameters
    ----------
    frequency : array, shape (...)
        q, in cycles per native pixel.
    order, width : int, float
        As for `normalized_kernel`.

    Returns
    -------
    array, shape (...)
        1 at frequency 0; accurate to 1e-12.
    """
    frequency = np.asarray(frequency, float)
    highest = float(np.abs(frequency).max(initial=0.0))
    place, weight = _quadrature(order, width, NUM_NODES + int(np.ceil(4 * highest)))

    def integrate(q):
        return np.cos(2 * np.pi * np.multiply.outer(q, place)) @ weight

    # The Chebyshev coefficients of cos(z t), Bessel functions, vanish for orders some way above z.
    phase = 2 * np.pi * order * width * highest
    degree = int(np.ceil(phase + 10 * np.cbrt(phase))) + 20
    if frequency.size <= degree or highest == 0:
        return integrate(frequency)
    return Chebyshev.interpolate(integrate, degree, domain=[-highest, highest])(frequency)


def _quadrature(order, width, num_nodes) -> tuple[np.ndarray, np.ndarray]:
    """Return places on the positive half of the kernel, and weights that hold its values, twice."""
    edge = order * width
    # The kernel's own ends and, through the sum, their copies one pixel apart are where it isn't smooth.
    pieces = np.arange(np.ceil(edge) + 1)
    breaks = np.unique(np.clip(np.concatenate([pieces, pieces + edge % 1, pieces - edge % 1]), 0, edge))
    node, weight = np.polynomial.legendre.leggauss(num_nodes)
    half = np.diff(breaks)[:, None] / 2
    place = (breaks[:-1, None] + half * (1 + node)).ravel()
    return place, 2 * (half * weight).ravel() * normalized_kernel(place, order, width)


def kernel_widths(affine: np.ndarray) -> np.ndarray:
    """Return by how much the kernel is widened along the native y and x: 1, or the target pixel's side if that is larger.

    Parameters
    ----------
    affine : array, shape (2, 2)
        `d(y, x) on the target / d(y, x) on the native pixels`.

    Returns
    -------
    array, shape (2,)
        In native pixels. Rounded to 1e-6, so that grids of one scale don't get a wider kernel from rounding errors.
    """
    return np.maximum(1.0, np.linalg.norm(np.linalg.inv(affine), axis=1).round(6))


class ResampledPSF(AbstractPSF):
    """PSF of an image that was resampled onto other pixels, the native PSF convolved with the kernel.

    With the transfer function P of the native PSF and the transform K of the kernel along each axis, the transfer function is
    `P(q) K(q_y) K(q_x)` at the frequency q in cycles per native pixel. Total flux is conserved.

    Parameters
    ----------
    psf : AbstractPSF or array
        PSF on the native pixels, pixel response included.
    affine : array, shape (2, 2)
        `d(y, x) on the target / d(y, x) on the native pixels`, in the middle of the image.
    order : int
        Of the Lanczos kernel, 2 to 5. Where target pixels are larger than native ones, the kernel is as much wider.

    Raises
    ------
    ValueError
        If the affine map isn't an invertible 2 x 2 matrix, or the order isn't one of 2 to 5.

    Notes
    -----
    Samples of an image repeat its spectrum at every whole number of cycles per native pixel, and a kernel of finite length
    doesn't take these replicas away entirely. What is left depends on where a source lies within its pixel, so that no PSF
    can hold it. For a Gaussian point source, wherever it lies, it is at most so many per cent of the peak (target pixels no
    larger than native ones; FWHM with the pixel response; in brackets what the kernel does to the PSF, which this class
    knows):

    ============  ===========  ===========
    FWHM          order 3      order 5
    ============  ===========  ===========
    2.5 pixels    0.82 (0.66)  0.33 (0.28)
    4 pixels      0.40 (0.36)  0.14 (0.13)
    ============  ===========  ===========

    Kernels that are widened for larger target pixels leave less: 0.02 for FWHM 2.5, order 3 and pixels 2.5 times larger.
    """

    psf: AbstractPSF
    affine: np.ndarray
    order: int = eqx.field(static=True)

    def __init__(self, psf, affine, order: int = 3):
        affine = np.array(affine, dtype=float)
        if affine.shape != (2, 2) or not np.isfinite(affine).all() or np.linalg.det(affine) == 0:
            raise ValueError(
                "ResampledPSF wants an invertible 2 x 2 matrix d(target y, x) / d(native y, x); got "
                f"{affine.tolist()}. `Resampling.resampled_psf(psf)` knows it."
            )
        self.psf = as_psf(psf)
        self.affine = affine
        self.order = check_order(order)

    @property
    def num_channels(self) -> int:  # noqa: D102
        return self.psf.num_channels

    @property
    def band_limit(self) -> float:  # noqa: D102
        return self.psf.band_limit * float(np.abs(np.linalg.inv(self.affine)).sum(axis=0).max())

    @property
    def extent(self) -> float:  # noqa: D102
        image, offset, spacing = self._native_image()
        # Half of it: samples may miss the tops of ripples.
        bright = (np.abs(image) > EXTENT_TOLERANCE / 2 * image.max(axis=(1, 2), keepdims=True)).any(axis=0)
        y, x = np.meshgrid(offset, offset, indexing="ij")
        reach = np.abs(self.affine @ np.stack([y[bright], x[bright]])).max()
        return float(reach + spacing / 2 * np.sqrt(abs(np.linalg.det(self.affine))))

    @property
    def size(self) -> float:  # noqa: D102
        # It isn't given on these pixels: they may be part of what the native stamp fits into.
        return 0.0

    @property
    def effective_sigma(self) -> np.ndarray:  # noqa: D102
        image, _, _ = self._native_image()
        return np.sqrt(abs(np.linalg.det(self.affine)) / (2 * np.pi * image.max(axis=(1, 2))))

    def transfer(self, ky, kx, affine):  # noqa: D102
        native = np.asarray(affine, float) @ self.affine
        qy, qx = mapped_frequencies(ky, kx, native)
        value = self.psf.transfer(ky, kx, native)
        passed = np.maximum(np.abs(qy), np.abs(qx)) < self.psf.band_limit
        kernel = np.zeros(passed.shape)
        kernel[passed] = np.prod(
            [
                kernel_transform(q[passed], self.order, width)
                for q, width in zip((qy, qx), kernel_widths(self.affine), strict=True)
            ],
            axis=0,
        )
        return value * kernel

    def _native_image(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Return the PSF on fine native pixels, (channel, y, x) per native pixel; the offsets along an axis, and their step."""
        # Twice as fine as the band limit asks for: there always is a sample close to the peak.
        step = 0.25 / self.psf.band_limit
        reach = self.psf.extent + self.order * kernel_widths(self.affine).max()
        count = coarse_fast_length(int(np.ceil(2 * reach / step)) + 2)
        k = np.fft.fftfreq(count, step)
        modes = self.transfer(k, k, np.linalg.inv(self.affine))
        return np.fft.ifft2(modes).real / step**2, np.fft.fftfreq(count) * count * step, step
