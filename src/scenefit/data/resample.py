"""Observed images on other pixels: a sparse linear map, with what it does to masks and noise.

Pixel j of the target lies at `p_j` on the native pixels n and covers `a_j` of them. With the kernel k of
`sky.resampledpsf` along each axis it gets

    d_j = a_j sum_n k(p_jy - n_y) k(p_jx - n_x) d_n

so that a constant surface brightness stays what it is and the flux of a source, which the sum of its pixels is, is kept.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import NamedTuple

import equinox as eqx
import numpy as np
import scipy.sparse

from scenefit.sky.frame import as_wcs, pixel_map, pixel_scale_of
from scenefit.sky.psf import AbstractPSF
from scenefit.sky.resampledpsf import ResampledPSF, check_order, kernel_widths, lanczos

MASK_TOLERANCE = 1e-3
"""Part of a target pixel's absolute weights that may fall on pixels without information.

A missing pixel is taken to be as bright as the weighted mean of the others. The absolute weights of order 3 sum to at most 2.4
times the weights themselves (3.5 for order 5), so at most 0.24 % (0.35 %) of the difference to its true value ends up in the
target pixel: a fraction of the noise unless masked pixels would stand out by some hundred standard deviations."""


class Rows(NamedTuple):
    """The linear map of one channel, as its masks leave it: target pixel j is `sum_i weight[j, i] native[index[j, i]]`.

    index : array of int, shape (target pixel, k)
        Flat native pixel numbers. Where the weight is 0 they mean nothing.
    weight : array, shape (target pixel, k)
        0 on native pixels that are masked or don't exist, and in the rows of target pixels that aren't usable.
    usable : array of bool, shape (target pixel,)
    """

    index: np.ndarray
    weight: np.ndarray
    usable: np.ndarray


class Resampling(eqx.Module):
    """Linear map from native pixels to those of a target grid; made by `Resampling.between`. Lives on the host.

    Flat pixel numbers are those of `image.ravel()`, y before x.

    Attributes
    ----------
    index : array of int, shape (target pixel, k)
        Native pixels under the kernel around each target pixel; 0 for those that don't exist.
    weight : array, shape (target pixel, k)
        Native pixels' share in the flux of each target pixel; 0 for those that don't exist. If all exist, they sum to the
        target pixel's area in native pixels.
    coverage : array, shape (target pixel,)
        Part of the kernel's absolute weights that falls on native pixels that exist: 1 well inside the native image, 0 far
        from it.
    area : array, shape (target pixel,)
        Of the target pixels, in native pixels; 0 without coverage.
    affine : array, shape (2, 2)
        `d(y, x) on the target / d(y, x) on the native pixels`, in the middle of the overlap.
    native_shape, shape : (int, int)
        Height and width of the native image and of the target grid.
    order : int
        Of the Lanczos kernel.

    Notes
    -----
    A constant surface brightness is kept exactly. The flux of a compact source is kept but for what the kernel leaves of the
    replicas of its light: for a Gaussian of FWHM 3 pixels, with targets turned, 5.6 times finer, 2.5 times coarser or distorted,
    2e-3 with order 3 and 4e-4 with order 5 at most, and much less where target pixels aren't about as large as native ones.
    """

    index: np.ndarray
    weight: np.ndarray
    coverage: np.ndarray
    area: np.ndarray
    affine: np.ndarray
    native_shape: tuple[int, int] = eqx.field(static=True)
    shape: tuple[int, int] = eqx.field(static=True)
    order: int = eqx.field(static=True)

    @classmethod
    def between(cls, source_wcs, source_shape, target_wcs, target_shape, order: int = 3) -> Resampling:
        """Build the map from the pixels of one image to those of another.

        Target pixels are placed by the two WCS, distortions included. Where they are larger than native ones, the kernel is
        as much wider, so that what they can't hold is averaged over instead of aliased. The width is one for the whole grid:
        the resampled image then has one PSF, apart from what a distortion does to it. It is meant for cutouts: the map takes
        12 bytes for each native pixel under the kernel of each target pixel, 430 for order 3.

        Parameters
        ----------
        source_wcs, target_wcs : WCS or FITS header, or None for both
            Without them, pixels of the same number coincide.
        source_shape, target_shape : (int, int)
            Height and width.
        order : int
            Of the Lanczos kernel, 2 to 5. The default, 3, is a compromise: the higher, the better a kernel keeps to the PSF,
            and the further it carries bad pixels, edges and the correlation of the noise.

        Raises
        ------
        ValueError
            If only one WCS is given or makes no sense, a shape isn't two positive integers, the order isn't one of 2 to 5, or
            no target pixel lies on the native image.
        """
        order = check_order(order)
        source_shape, target_shape = _check_shape(source_shape, "native"), _check_shape(target_shape, "target")
        source_wcs, target_wcs = as_wcs(source_wcs), as_wcs(target_wcs)
        if (source_wcs is None) != (target_wcs is None):
            having, lacking = ("target", "native image") if source_wcs is None else ("native image", "target")
            raise ValueError(f"The {having} has a WCS and the {lacking} doesn't: give both one, or neither.")
        position = pixel_map(target_wcs, source_wcs, *np.mgrid[: target_shape[0], : target_shape[1]])
        finite = np.isfinite(position).all(axis=-1)
        inside = finite & (position > -0.5).all(axis=-1) & (position < np.array(source_shape) - 0.5).all(axis=-1)
        if not inside.any():
            raise ValueError(
                "No pixel of the target lies on the native image: that covers "
                f"{_extent(source_wcs, source_shape)}, the target {_extent(target_wcs, target_shape)}."
            )
        affine = np.linalg.inv(_local_affine(target_wcs, source_wcs, np.argwhere(inside).mean(axis=0)))
        area = _pixel_areas(target_wcs, source_wcs, target_shape)
        near = finite & np.isfinite(area)
        parts = [
            _axis_weights(np.where(near, position[..., axis], -np.inf).ravel(), source_shape[axis], order, width)
            for axis, width in enumerate(kernel_widths(affine))
        ]
        (row, weight_y, covered_y), (column, weight_x, covered_x) = parts
        coverage = covered_y * covered_x
        area = np.where(coverage > 0, area.ravel(), 0.0)
        weight = (weight_y * area[:, None])[:, :, None] * weight_x[:, None, :]
        index = (row * np.int32(source_shape[1]))[:, :, None] + column[:, None, :]
        return cls(
            index=index.reshape(len(area), -1),
            weight=weight.reshape(len(area), -1),
            coverage=coverage,
            area=area,
            affine=affine,
            native_shape=source_shape,
            shape=target_shape,
            order=order,
        )

    def resampled_psf(self, psf: AbstractPSF | np.ndarray) -> ResampledPSF:
        """Return the PSF of the resampled image, on the target's pixels, from that on the native pixels."""
        return ResampledPSF(psf, self.affine, self.order)

    def rows(self, valid: np.ndarray) -> tuple[Rows, ...]:
        """Return the map of each channel with the weights that its masks leave.

        A target pixel of which more than `MASK_TOLERANCE` of the absolute weights falls on native pixels that are masked or
        don't exist isn't usable. In the others the remaining weights are scaled to the same sum, so that surface brightness
        isn't biased.

        Parameters
        ----------
        valid : array of bool, shape (channel, y, x)
            Which native pixels carry information.

        Raises
        ------
        ValueError
            If it doesn't have the native shape.
        """
        return tuple(self._rows_of_channels(self._check_planes(valid, "valid").astype(bool)))

    def matrix(self, rows: Rows) -> scipy.sparse.csr_array:
        """Return the map of a channel as a sparse matrix, shape (target pixel, native pixel).

        With the native variances d, the covariance of the resampled pixels is `A diag(d) A^T`.
        """
        # A copy: what follows sorts indices in place.
        matrix = self._stored(rows.index, rows.weight).copy()
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        return matrix

    def apply(self, planes: np.ndarray, valid: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Resample images.

        Parameters
        ----------
        planes : array, shape (channel, y, x)
            Flux per native pixel.
        valid : array of bool, shape (channel, y, x), optional
            Which native pixels carry information; by default those that are finite. See `rows` for how masks are handled.

        Returns
        -------
        planes : array, shape (channel, y, x)
            Flux per target pixel; 0 where it isn't usable.
        usable : array of bool, shape (channel, y, x)

        Raises
        ------
        ValueError
            If shapes don't match, or a valid pixel isn't finite.
        """
        planes, valid = self._check_pair(planes, valid, "planes")
        return self._map(planes, valid, lambda weight: weight)

    def variance(self, variance: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
        """Return the variance of each target pixel for independent noise of the native ones: `sum_i weight_i^2 variance_i`.

        Target pixels share native ones, so their noise is correlated: see `matrix`.

        Parameters
        ----------
        variance : array, shape (channel, y, x)
            Of the native pixels.
        valid : array of bool, shape (channel, y, x), optional
            As given to `apply`; by default where the variance is finite.

        Returns
        -------
        array, shape (channel, y, x)
            Infinite where the target pixel isn't usable.

        Raises
        ------
        ValueError
            If shapes don't match, or the variance of a valid pixel isn't finite or is negative.
        """
        variance, valid = self._check_pair(variance, valid, "variance")
        if (variance[valid] < 0).any():
            raise ValueError(f"Variances must be at least 0; got {variance[valid].min():g}.")
        mapped, usable = self._map(variance, valid, np.square)
        return np.where(usable, mapped, np.inf)

    def _map(self, planes, valid, change) -> tuple[np.ndarray, np.ndarray]:
        """Return the planes mapped by the changed weights, and which target pixels are usable."""
        mapped = np.zeros((len(planes), *self.shape))
        usable = np.zeros(mapped.shape, bool)
        for c, rows in enumerate(self._rows_of_channels(valid)):
            plane = np.where(valid[c], planes[c], 0.0).ravel()
            mapped[c] = (self._stored(rows.index, change(rows.weight)) @ plane).reshape(self.shape)
            usable[c] = rows.usable.reshape(self.shape)
        return mapped, usable

    def _rows_of_channels(self, valid) -> Iterator[Rows]:
        """Yield the map of each channel; channels with the same mask share the arrays."""
        last, rows = None, None
        for plane in valid:
            if rows is None or last is None or not np.array_equal(plane, last):
                last, rows = plane, self._masked_rows(plane.ravel())
            yield rows

    def _masked_rows(self, valid) -> Rows:
        """Return the map for one mask of native pixels, flat."""
        weight, kept = self.weight, self.coverage
        if not valid.all():
            seen = valid[self.index]
            size = np.abs(weight)
            weight = np.where(seen, weight, 0.0)
            total = size.sum(axis=1)
            kept = kept * np.divide(np.abs(weight).sum(axis=1), total, out=np.zeros_like(total), where=total > 0)
        usable = kept >= 1 - MASK_TOLERANCE
        total = weight.sum(axis=1)
        scale = np.divide(self.area, total, out=np.zeros_like(total), where=usable)
        return Rows(self.index, weight * scale[:, None], usable)

    def _stored(self, index, weight) -> scipy.sparse.csr_array:
        """Return index and weight as a sparse matrix, as they are."""
        start = np.arange(0, index.size + 1, index.shape[1], dtype=index.dtype)
        shape = index.shape[0], int(np.prod(self.native_shape))
        return scipy.sparse.csr_array((weight.ravel(), index.ravel(), start), shape=shape)

    def _check_planes(self, planes, what) -> np.ndarray:
        """Return planes if they have the native shape."""
        planes = np.asarray(planes)
        if planes.ndim != 3 or planes.shape[1:] != self.native_shape:
            raise ValueError(
                f"{what} wants the shape (channel, {', '.join(map(str, self.native_shape))}) of the native image that this "
                f"Resampling was made for; got {planes.shape}."
            )
        return planes

    def _check_pair(self, planes, valid, what) -> tuple[np.ndarray, np.ndarray]:
        """Return planes in float64 and their mask, if they go together."""
        planes = self._check_planes(planes, what).astype(float)
        if valid is None:
            return planes, np.isfinite(planes)
        valid = self._check_planes(valid, "valid").astype(bool)
        if len(valid) != len(planes):
            raise ValueError(f"{what} has {len(planes)} channels and valid {len(valid)}.")
        if not np.isfinite(planes[valid]).all():
            raise ValueError(f"{what} must be finite wherever valid is True; leave valid out to mask what isn't.")
        return planes, valid


def _axis_weights(position, count, order, width) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the native rows (or columns) under the kernel at each position, their weights, and the part that exists.

    Weights sum to 1 before those of rows that don't exist are set to 0. Positions that are infinite have none.
    """
    reach = order * width
    known = (position > -reach) & (position < count - 1 + reach)
    place = np.where(known, position, 0.0)
    first = np.floor(place - reach).astype(np.int32) + 1
    row = first[:, None] + np.arange(int(np.ceil(2 * reach)), dtype=np.int32)
    weight = lanczos((place[:, None] - row) / width, order)
    weight /= weight.sum(axis=1, keepdims=True)
    exists = (row >= 0) & (row < count) & known[:, None]
    size = np.abs(weight)
    coverage = np.where(exists, size, 0.0).sum(axis=1) / size.sum(axis=1)
    return np.where(exists, row, 0), np.where(exists, weight, 0.0), coverage


def _local_affine(wcs, other, middle) -> np.ndarray:
    """Return d(y, x) on another grid / d(y, x) at the position `middle`, by central differences."""
    steps = np.array([[0.5, 0], [-0.5, 0], [0, 0.5], [0, -0.5]])
    ends = pixel_map(wcs, other, middle[0] + steps[:, 0], middle[1] + steps[:, 1])
    return np.stack([ends[0] - ends[1], ends[2] - ends[3]], axis=-1)


def _pixel_areas(wcs, other, shape) -> np.ndarray:
    """Return the areas of pixels on another grid, as of the quadrilaterals of their corners."""
    corner = pixel_map(wcs, other, *(np.mgrid[: shape[0] + 1, : shape[1] + 1] - 0.5))
    one, two = corner[1:, 1:] - corner[:-1, :-1], corner[1:, :-1] - corner[:-1, 1:]
    return 0.5 * np.abs(one[..., 0] * two[..., 1] - one[..., 1] * two[..., 0])


def _check_shape(shape, what) -> tuple[int, int]:
    """Return a shape as two integers."""
    try:
        height, width = (operator.index(n) for n in shape)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise ValueError(f"The {what} shape wants (height, width) of at least one pixel each; got {shape}.")
    return height, width


def _extent(wcs, shape) -> str:
    """Return where an image lies, for error messages."""
    height, width = shape
    if wcs is None:
        return f"{height} x {width} pixels"
    center = wcs.pixel_to_world((width - 1) / 2, (height - 1) / 2).icrs
    y, x = pixel_scale_of(wcs) * np.array(shape)
    return f"{y:.1f} x {x:.1f} arcsec around ({center.ra.deg:.5f}, {center.dec.deg:.5f})"
