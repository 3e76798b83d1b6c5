"""Point spread functions as sums of Gaussians: analytic, and fitted to an image of a point source."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import astropy.units as u
import equinox as eqx
import numpy as np
import scipy.optimize
from scipy import ndimage

from scenefit.sky import units
from scenefit.sky.psf import EXTENT_TOLERANCE, AbstractPSF, ImagePSF

BAND_TOLERANCE = 1e-8
"""Beyond its band limit the transfer function is below this, and taken as zero."""
RESIDUAL_LIMIT = 0.02
"""Fraction of the peak by which a fitted mixture may miss the image without a warning."""
RESIDUAL_TARGET = 3e-4
"""Fraction of the peak below which no further component is tried. At 1e-3 already, the wings that a mixture lacks are 0.7 %
of the flux of a Kolmogorov profile; here 0.2 %."""
MAX_COMPONENTS = 6
"""Components tried at most; a Moffat profile (beta 3) takes 5, a Kolmogorov profile 4."""
MIN_SIGMA, MIN_SIGMA_INTEGRATED = 0.5, 0.2
"""Smallest fitted widths: in samples where an image is sampled, since samples say nothing of the flux of a narrower Gaussian
(3 % of it depends on where they fall); in pixels where it is integrated over them."""
MAX_SIGMA = 1 / 3
"""Largest fitted width, in units of the image's side: wider Gaussians, faint on the image, would hold much flux outside."""
MIN_DRAWN_SIGMA = 0.05
"""In pixels: the integral of a narrower Gaussian in the middle of a pixel doesn't depend on its width, and would take ever
more nodes."""
SPREADS = ((0.7, 2.0), (0.5, 3.0))
"""First widths, smallest and largest, in units of that of a single Gaussian."""
MAX_STEPS, STEP_TOLERANCE = 40, 1e-4
"""Steps of a least-squares fit, and the relative decrease of the sum of squares at which it ends."""


class GaussianMixturePSF(AbstractPSF):
    """A sum of elliptical Gaussians about one centre, times the pixel response if asked for.

    The transfer function is `sum_g w_g exp(-2 pi^2 q^T C_g q)`; total flux is conserved, since the weights sum to 1.

    Parameters
    ----------
    weights : array, shape (channel, component) or (component,)
        Share of each component in the flux, not negative; scaled to unit sum.
    covariances : array, shape (channel, component, 2, 2) or (component, 2, 2)
        Covariances of (y, x) in pixels squared, positive definite. As many channels and components as `weights` has.
    integrate_pixel : bool
        Whether to convolve with a square pixel. Leave it off where the components hold the pixel's width already.
    residual : array, shape (channel,), optional
        Largest difference from the image that the mixture was fitted to, as a fraction of that image's peak; set by
        `fit`.

    Raises
    ------
    ValueError
        If the shapes don't belong together, a weight is negative or all of a channel are 0, or a covariance isn't
        symmetric and positive definite.
    """

    weights: np.ndarray
    covariances: np.ndarray
    integrate_pixel: bool = eqx.field(static=True)
    residual: np.ndarray | None

    def __init__(self, weights, covariances, *, integrate_pixel: bool = False, residual=None):
        weights = np.array(units.as_numbers(weights, "The weights of a GaussianMixturePSF"))
        covariances = np.array(units.to_unit(covariances, u.pix**2, "The covariances of a GaussianMixturePSF"))
        shapes = f"weights {weights.shape}, covariances {covariances.shape}"
        if weights.ndim == 1 and covariances.ndim == 3:
            weights, covariances = weights[None], covariances[None]
        if weights.ndim != 2 or not weights.size or covariances.shape != (*weights.shape, 2, 2):
            raise ValueError(
                "GaussianMixturePSF wants weights (channel, component) and covariances (channel, component, 2, 2), "
                f"or both without the channel axis; got {shapes}."
            )
        total = weights.sum(axis=1, keepdims=True)
        if not (np.isfinite(weights) & (weights >= 0) & (total > 0)).all():
            raise ValueError(f"The weights of a GaussianMixturePSF are >= 0, some of each channel > 0; got {weights}.")
        if not _is_positive_definite(covariances):
            raise ValueError(
                f"The covariances of a GaussianMixturePSF must be symmetric and positive definite; got {covariances}."
            )
        if residual is not None and np.shape(residual) != (len(weights),):
            raise ValueError(f"The residual must have shape ({len(weights)},), one per channel; got {residual!r}.")
        self.weights = weights / total
        self.covariances = covariances
        self.integrate_pixel = integrate_pixel
        self.residual = None if residual is None else np.array(units.as_numbers(residual, "The residual"))

    @classmethod
    def fit(
        cls,
        image,
        num_components: int | Literal["auto"] = "auto",
        *,
        round: bool = False,
        integrate_pixel: bool = False,
        oversampling: int | float = 1,
    ) -> GaussianMixturePSF:
        """Fit an image of a point source by least squares, each channel on its own.

        The components have a common centre, anywhere on the image, which is fitted and becomes the position of the
        source. Flux beyond the image is what the Gaussians hold there.

        Parameters
        ----------
        image : array, shape (channel, y, x) or (y, x)
            Samples, pixel response included; at least 3 x 3. Any flux scale.
        num_components : int or "auto"
            Number of Gaussians, at least 1; fewer are kept if some get no flux. "auto" adds them until the residual is
            below `RESIDUAL_TARGET` of the peak, a further one doesn't explain significantly more (by the Bayesian
            information criterion), or there are `MAX_COMPONENTS`.
        round : bool
            Whether all components are circular.
        integrate_pixel : bool
            Whether the covariances are those without the pixel: Gaussians are then integrated over pixels to compare them
            with the image, and by the PSF that is returned. Otherwise they are sampled at the centres and hold the
            pixel's width. An undersampled image (sigma below about 0.6 pixels) needs it.
        oversampling : int or float
            Samples per pixel of the observation, at least 1. With `integrate_pixel` each sample is an integral over a whole
            pixel of the observation nonetheless.

        Returns
        -------
        GaussianMixturePSF
            With its `residual`, to which the noise of the image contributes.

        Warns
        -----
        UserWarning
            If a residual exceeds `RESIDUAL_LIMIT` of the peak: the mixture doesn't describe the image.

        Raises
        ------
        ValueError
            If the image has the wrong number of axes, is smaller than 3 x 3, holds NaN or infinities or has a sum that
            isn't positive, no Gaussian of positive flux fits it, `num_components` isn't a positive integer or "auto", or
            `oversampling` is below 1.

        Notes
        -----
        For given covariances and centre the weights follow by non-negative least squares; the others are found by
        Levenberg-Marquardt steps on the sum of squares that is left (variable projection, with the Jacobian of Kaufman
        1975). A single Gaussian gives the first shapes; several sets of widths and the mixture of one component less
        are tried as beginnings.

        References
        ----------
        Golub & Pereyra 1973, SIAM J. Numer. Anal. 10, 413; Kaufman 1975, BIT 15, 49. Gaussians as PSFs and profiles: Hogg &
        Lang 2013, PASP 125, 719.
        """
        given = ImagePSF(image, oversampling=oversampling, center="centroid")
        if min(given.image.shape[1:]) < 3:
            raise ValueError(f"A mixture is fitted to at least 3 x 3 samples; got shape {np.shape(image)}.")
        is_number = isinstance(num_components, int | np.integer) and not isinstance(num_components, bool)
        if num_components != "auto" and not (is_number and num_components >= 1):
            raise ValueError(f"num_components is 'auto' or an integer of at least 1; got {num_components!r}.")
        width = given.oversampling if integrate_pixel else 0.0
        found = [_fit_plane(plane, num_components, round, width) for plane in given.image]
        # As many components in all channels: copies of the widest without weight.
        index = np.arange(max(len(each.weights) for each in found))
        weights = [np.pad(each.weights, (0, len(index) - len(each.weights))) for each in found]
        covariances = [each.covariances[np.minimum(index, len(each.weights) - 1)] for each in found]
        residual = np.array([np.abs(each.residual).max() for each in found])
        if (bad := np.flatnonzero(residual > RESIDUAL_LIMIT)).size:
            figures = ", ".join(f"{100 * residual[c]:.2g} % of the peak in channel {c}" for c in bad)
            warnings.warn(
                f"The sum of Gaussians differs from the PSF image by up to {figures} (limit {100 * RESIDUAL_LIMIT:g} %), noise "
                "of the image included. Ask for more components (num_components=), set integrate_pixel=True if the image is "
                "undersampled, or take the image itself: ImagePSF(image).",
                stacklevel=2,
            )
        covariances = np.stack(covariances) / given.oversampling**2
        return cls(np.stack(weights), covariances, integrate_pixel=integrate_pixel, residual=residual)

    @property
    def num_channels(self) -> int:  # noqa: D102
        return len(self.weights)

    @property
    def components(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights, shape (channel, component), and covariances in pixels squared, shape (channel, component, 2, 2)."""
        return self.weights, self.covariances

    @property
    def band_limit(self) -> float:  # noqa: D102
        # On the lines |qy| = L and |qx| = L, q^T C q is at least L^2 times the variance along y or x at fixed x or y.
        variance = 1 / np.linalg.inv(self.covariances).diagonal(axis1=-2, axis2=-1).max(axis=-1)
        share = self.weights * (self.weights > 0).sum(axis=1, keepdims=True) / BAND_TOLERANCE
        return float(np.sqrt(np.log(np.maximum(share, 1)) / (2 * np.pi**2 * variance)).max())

    @property
    def extent(self) -> float:  # noqa: D102
        heights = self.weights / (2 * np.pi * np.sqrt(np.linalg.det(self.covariances)))
        variances = np.linalg.eigvalsh(self.covariances)[..., -1]
        radii = map(_radius, heights, variances, EXTENT_TOLERANCE * self._peak)
        return max(radii) + 0.5 * self.integrate_pixel

    @property
    def size(self) -> float:  # noqa: D102
        return 0.0

    @property
    def effective_sigma(self) -> np.ndarray:  # noqa: D102
        return np.sqrt(1 / (2 * np.pi * self._peak))

    @property
    def _peak(self) -> np.ndarray:
        """Largest value, as a fraction of the flux per pixel; shape (channel,)."""
        return self.image((1, 1))[:, 0, 0]

    def transfer(self, ky, kx, affine):  # noqa: D102
        q = np.einsum("ab,akl->bkl", affine, np.stack(np.meshgrid(ky, kx, indexing="ij")))
        value = np.zeros((self.num_channels, *q.shape[1:]))
        for c, g in zip(*np.nonzero(self.weights), strict=True):
            exponent = np.einsum("akl,ab,bkl->kl", q, self.covariances[c, g], q)
            value[c] += self.weights[c, g] * np.exp(-2 * np.pi**2 * exponent)
        if self.integrate_pixel:
            value = value * np.sinc(q[0]) * np.sinc(q[1])
        return np.where(np.abs(q).max(axis=0) < self.band_limit, value, 0.0).astype(complex)

    def image(self, shape: tuple[int, int]) -> np.ndarray:
        """Draw a point source of unit flux in the middle of a grid of the observation's pixels.

        Parameters
        ----------
        shape : (int, int)
            Height and width; odd ones put the source on a pixel.

        Returns
        -------
        array, shape (channel, y, x)
            Values at the pixels' centres or, with `integrate_pixel`, integrals over the pixels; they sum to 1 on a large
            grid.
        """
        y, x = (axis.ravel() - (n - 1) / 2 for axis, n in zip(np.mgrid[: shape[0], : shape[1]], shape, strict=True))
        width = float(self.integrate_pixel)
        variance, axes = np.linalg.eigh(self.covariances)
        scale = 1 / np.maximum(variance, (MIN_DRAWN_SIGMA * width) ** 2)
        precision = np.einsum("cgab,cgb,cgdb->cgad", axes, scale, axes)
        planes = np.zeros((self.num_channels, y.size))
        for c, g in zip(*np.nonzero(self.weights), strict=True):
            planes[c] += self.weights[c, g] * _moments(y, x, precision[c, g], width)[0]
        return planes.reshape(-1, *shape)


def _is_positive_definite(matrices: np.ndarray) -> bool:
    """Whether all matrices, shape (..., 2, 2), are finite, symmetric and positive definite."""
    if not np.isfinite(matrices).all() or not np.allclose(matrices, matrices.swapaxes(-1, -2), rtol=1e-6, atol=0):
        return False
    return bool((np.linalg.eigvalsh(matrices) > 0).all())


def _radius(heights: np.ndarray, variances: np.ndarray, threshold: float) -> float:
    """Return where a sum of round Gaussians about one centre falls to a threshold below its peak."""
    # Beyond this no component exceeds its part of the threshold.
    reach = np.sqrt(2 * variances * np.log(np.maximum(heights * len(heights) / threshold, 1))).max()

    def excess(radius):
        return (heights * np.exp(-(radius**2) / (2 * variances))).sum() - threshold

    return float(scipy.optimize.brentq(excess, 0.0, (1 + 1e-9) * reach, xtol=1e-12))


def _moments(y: np.ndarray, x: np.ndarray, precision: np.ndarray, width: float) -> np.ndarray:
    """Return the means over squares of a Gaussian of unit flux times 1, y, x, y^2, y x and x^2; shape (6, position).

    Gauss-Legendre quadrature, accurate to 1e-5 of the largest value.

    Parameters
    ----------
    y, x : arrays, shape (position,)
        Middles of the squares, from the Gaussian's centre.
    precision : array, shape (2, 2)
        Inverse covariance.
    width : float
        Side of the squares; 0 gives the values at their middles.
    """
    # The number of nodes was found by comparison with the error function, for sigma from 0.1 to 3 widths.
    count = int(np.ceil(1.2 * width * np.sqrt(precision.diagonal().max()))) + 2 if width else 1
    nodes, mass = np.polynomial.legendre.leggauss(count)
    dy, dx = (axis.ravel() for axis in np.meshgrid(*[nodes * width / 2] * 2, indexing="ij"))
    area = np.outer(mass, mass).ravel() / 4
    y, x = y[:, None] + dy, x[:, None] + dx
    exponent = precision[0, 0] * y * y + 2 * precision[0, 1] * y * x + precision[1, 1] * x * x
    density = np.sqrt(np.linalg.det(precision)) / (2 * np.pi) * np.exp(-0.5 * exponent) * area
    return np.stack([np.einsum("pn,pn->p", density, each) for each in (y**0, y, x, y * y, y * x, x * x)])


class _Solution(NamedTuple):
    """State of a fit: its parameters, the mixture that they stand for, and what is left of the image."""

    parameters: np.ndarray
    weights: np.ndarray
    covariances: np.ndarray
    residual: np.ndarray
    jacobian: np.ndarray

    @property
    def cost(self) -> float:
        """Sum of squares."""
        return float(self.residual @ self.residual)


@dataclass(frozen=True)
class _Stamp:
    """An image of unit peak, and the family of mixtures that may describe it.

    The parameters are the centre (y, x) and, for each component, (p, t, r) of its covariance C (p = r, t = 0 if round):

        C^-1 = (smallest^2 + L L^T)^-1 + largest^-2,   L = [[exp(p), 0], [t exp(r), exp(r)]]

    which keeps the widths between `smallest` and `largest`.
    """

    values: np.ndarray
    y: np.ndarray
    x: np.ndarray
    width: float
    smallest: float
    largest: float
    round: bool

    def solve(self, parameters: np.ndarray) -> _Solution:
        """Return the best mixture of given centre and covariances, with the Jacobian of its residual."""
        precision, slopes = self._precisions(parameters[2:])
        covariances = np.linalg.inv(precision)
        y, x = self.y - parameters[0], self.x - parameters[1]
        moments = np.stack([_moments(y, x, each, self.width) for each in precision])
        basis = moments[:, 0].T
        q, r = np.linalg.qr(basis)
        weights = scipy.optimize.nnls(r, q.T @ self.values, maxiter=50 * len(r))[0]
        # The logarithmic derivative of a Gaussian by its inverse covariance is (C - r r^T) / 2.
        factors = np.zeros((*slopes.shape[:2], 6))
        factors[..., 0] = 0.5 * np.einsum("gab,gpab->gp", covariances, slopes)
        factors[..., 3:] = -slopes[..., [0, 0, 1], [0, 1, 1]] * np.array([0.5, 1.0, 0.5])
        by_shape = weights[:, None, None] * (factors @ moments)
        by_center = np.einsum("g,gab,gbn->an", weights, precision, moments[:, 1:3])
        jacobian = np.concatenate([by_center, by_shape.reshape(-1, len(self.values))]).T
        used = np.linalg.qr(basis[:, weights > 0])[0]
        jacobian = jacobian - used @ (used.T @ jacobian)
        return _Solution(parameters, weights, covariances, basis @ weights - self.values, jacobian)

    def _precisions(self, shapes):
        """Return the inverse covariances, (component, 2, 2), and their derivatives, (component, parameter, 2, 2)."""
        p, t, r = (shapes, 0 * shapes, shapes) if self.round else shapes.reshape(-1, 3).T
        a, b, zero = np.exp(p), np.exp(r), 0 * p
        square = _symmetric(a * a, t * a * b, (1 + t * t) * b * b)
        by_p, by_t = _symmetric(2 * a * a, t * a * b, zero), _symmetric(zero, a * b, 2 * t * b * b)
        by_r = _symmetric(zero, t * a * b, 2 * (1 + t * t) * b * b)
        slopes = np.stack([by_p + by_r] if self.round else [by_p, by_t, by_r], axis=1)
        inner = np.linalg.inv(self.smallest**2 * np.eye(2) + square)
        return inner + np.eye(2) / self.largest**2, -inner[:, None] @ slopes @ inner[:, None]

    def parameters(self, center: np.ndarray, covariances: np.ndarray) -> np.ndarray:
        """Return the parameters of a centre and covariances (round ones if need be), these brought between the limits."""
        variance, axes = np.linalg.eigh(covariances)
        variance = np.clip(variance, 1.1 * self.smallest**2, 0.9 * self.largest**2)
        square = 1 / (1 / variance - 1 / self.largest**2) - self.smallest**2
        root = np.linalg.cholesky(np.einsum("gab,gb,gcb->gac", axes, square, axes))
        first, second = root[:, 0, 0], root[:, 1, 1]
        shapes = [np.log(first)] if self.round else [np.log(first), root[:, 1, 0] / second, np.log(second)]
        return np.concatenate([center, np.stack(shapes, axis=1).ravel()])


def _symmetric(yy, yx, xx) -> np.ndarray:
    """Return the matrices [[yy, yx], [yx, xx]], shape (component, 2, 2)."""
    return np.stack([yy, yx, yx, xx], axis=-1).reshape(-1, 2, 2)


def _descend(stamp: _Stamp, parameters: np.ndarray) -> _Solution:
    """Return the mixture of least squares next to given parameters, by Levenberg-Marquardt steps."""
    best, damping = stamp.solve(parameters), 1e-2
    for _ in range(MAX_STEPS):
        normal = best.jacobian.T @ best.jacobian
        scale = normal.diagonal() + 1e-12 * normal.diagonal().max() + 1e-300
        step = np.linalg.solve(normal + damping * np.diag(scale), -best.jacobian.T @ best.residual)
        # At most one sample, and a factor e in width; the centre stays on the image.
        moved = best.parameters + np.clip(step, -1, 1)
        moved[:2] = np.clip(moved[:2], 0.0, [stamp.y[-1], stamp.x[-1]])
        trial = stamp.solve(moved)
        decrease = best.cost - trial.cost
        damping = damping / 5 if decrease > 0 else damping * 5
        if decrease > 0:
            best = trial
        # 1e-16: rounding, for an image of unit peak.
        if 0 < decrease < STEP_TOLERANCE * best.cost + 1e-16 or damping > 1e8:
            break
    return best


def _fit_plane(plane: np.ndarray, num_components: int | str, round: bool, width: float) -> _Solution:
    """Return the mixture that describes one channel, its components from narrow to wide."""
    values = plane / plane.max()
    y, x = (axis.ravel().astype(float) for axis in np.mgrid[: values.shape[0], : values.shape[1]])
    smallest = MIN_SIGMA_INTEGRATED * width if width else MIN_SIGMA
    # A hot pixel is no star.
    middle = np.array(np.unravel_index(np.argmax(ndimage.uniform_filter(values, 3)), values.shape), dtype=float)
    stamp = _Stamp(values.ravel(), y, x, width, smallest, max(MAX_SIGMA * max(values.shape), 2 * smallest), round)
    # The width of a Gaussian of this flux.
    variance = values.sum() / (2 * np.pi)
    single = best = _descend(stamp, stamp.parameters(middle, variance * np.eye(2)[None]))
    count = MAX_COMPONENTS if num_components == "auto" else int(num_components)
    for n in range(2, count + 1):
        if num_components == "auto" and np.abs(best.residual).max() < RESIDUAL_TARGET:
            break
        starts = [single.covariances * np.geomspace(*spread, n)[:, None, None] ** 2 for spread in SPREADS]
        starts.append(np.concatenate([best.covariances, 4 * best.covariances[-1:]]))
        trials = [_descend(stamp, stamp.parameters(single.parameters[:2], each)) for each in starts]
        trial = min(trials, key=lambda each: each.cost)
        if num_components == "auto" and not _is_better(trial, best):
            break
        best = _sorted(trial)
    if not best.weights.any():
        raise ValueError("No Gaussian of positive flux fits the PSF image: is there a star on it, and no background?")
    return _sorted(best)


def _is_better(trial: _Solution, best: _Solution) -> bool:
    """Whether a mixture of one component more earns its parameters, by the Bayesian information criterion."""
    size = len(best.residual)
    extra = 1 + (len(trial.parameters) - 2) / len(trial.weights)
    return bool(size * np.log(max(best.cost, 1e-300) / max(trial.cost, 1e-300)) > extra * np.log(size))


def _sorted(solution: _Solution) -> _Solution:
    """Return the solution with its components from narrow to wide, those without flux left out."""
    order = np.argsort(np.linalg.det(solution.covariances))
    order = order[solution.weights[order] > 0]
    return solution._replace(weights=solution.weights[order], covariances=solution.covariances[order])
