"""Whitening of correlated images: a triangular matrix W with W^T W the inverse of the correlation matrix.

Pixels are put in an order, and each is predicted from those before it: what it differs by from its prediction, in units of the
standard deviation of that difference, is its whitened value. Whatever the predictions use, these values have unit variance; they
are independent if every pixel is predicted from all before it (the Cholesky factor), and nearly so if from the nearest ones
(Vecchia 1988, J. R. Stat. Soc. B 50, 297, doi:10.1111/j.2517-6161.1988.tb01729.x). Coarse lattices of pixels come before fine
ones: predictions from all sides keep the errors of smooth models right, which those from one side do not (orderings: Guinness
2018, Technometrics 60, 415, doi:10.1080/00401706.2018.1437476).

Correlations come as a band: `band[Ry + dy, Rx + dx, y, x]` is that of pixel (y, x) with pixel (y + dy, x + dx), in units of the
variance of each. Bands of shape (..., 1, 1) are the same everywhere.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax
from jaxtyping import Array, Float
from tqdm import tqdm

from scenefit.arrays.compilation import as_floats
from scenefit.arrays.linear import linear_map
from scenefit.arrays.progress import DELAY_SECONDS

MAX_DENSE = 1024
"""Images of so many pixels at most are whitened exactly."""
NUMBERS, CLOSE_ENOUGH = (24, 48, 96), 5e-3
"""From how many pixels each is predicted: the fewest with which twice as many would change the mean logarithm of the standard
deviation by less than this."""
RADIUS_PER_WIDTH, SMALLEST_RADIUS, RADIUS_STEP = 3.5, 8.0, 4.0
"""Radius of predictions, in units of the width of the correlation, and in pixels at least. It is a multiple of so many pixels,
lest every correlation has an order, and with it a compilation, of its own."""
JITTER = 1e-8
"""Added to the unit diagonal of correlations: images that are smoother than their pixels have singular ones."""
NOT_POSITIVE = "The correlation of the noise isn't positive definite: no noise can have it."
BATCH = 256
"""Pixels whose predictions are computed at a time."""


class Order(NamedTuple):
    """In which order pixels come, and from how many, at most how far away, each is predicted.

    Pixels are those of every `step`-th row and column: of images that are smoother than their pixels, the others follow from
    them. First come those of a lattice whose stride is a power of 2, then three more lattices for each halving of it. Stride
    and radius count these pixels. A pixel whose variance, those given from which it is predicted, is below the fraction `support`
    of its variance says nothing new and is left out.
    """

    step: int
    stride: int
    number: int
    radius: float
    support: float


class Lattice(NamedTuple):
    """Pixels of rows `first[0] + i stride` and columns `first[1] + j stride`."""

    stride: int
    first: tuple[int, int]


@functools.cache
def lattices(order: Order) -> tuple[Lattice, ...]:
    """Return the lattices, in order, that together are all pixels."""
    result, stride = [Lattice(order.stride, (0, 0))], order.stride
    while stride > 1:
        half = stride // 2
        result += [Lattice(stride, first) for first in ((half, half), (0, half), (half, 0))]
        stride = half
    return tuple(result)


def lattice_number(order: Order, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return which of the lattices pixels belong to."""
    number = np.full(np.broadcast(y, x).shape, -1)
    for n, (stride, first) in enumerate(lattices(order)):
        number[(number < 0) & (y % stride == first[0]) & (x % stride == first[1])] = n
    return number


@functools.cache
def neighbors(order: Order) -> tuple[np.ndarray, ...]:
    """Return from which pixels one of each lattice is predicted: offsets (y, x), the nearest first, the pixel itself last."""
    limit = int(np.ceil(order.radius))
    grid = np.arange(-limit, limit + 1)
    offsets = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1).reshape(-1, 2)
    square = (offsets**2).sum(axis=1)
    offsets = offsets[(square > 0) & (square <= order.radius**2)]
    offsets = offsets[np.argsort((offsets**2).sum(axis=1), kind="stable")]
    above = (offsets[:, 0] < 0) | ((offsets[:, 0] == 0) & (offsets[:, 1] < 0))
    result = []
    for number, (_, first) in enumerate(lattices(order)):
        rank = lattice_number(order, first[0] + offsets[:, 0], first[1] + offsets[:, 1])
        before = (rank < number) | ((rank == number) & above)
        result.append(np.concatenate([offsets[before][: order.number], [[0, 0]]]))
    return tuple(result)


def choose_order(correlation: np.ndarray, support: float, step: int = 1) -> Order:
    """Return an order for a correlation function, shape (2 R + 1, 2 R + 1), the same everywhere or on the average.

    Parameters
    ----------
    correlation : array
    support : float
        See `Order`.
    step : int
        The smallest that will do. Larger ones are taken until no pixel follows from others. None does beyond the reach of the
        correlation, even if, as an average from place to place, it is that of no noise.
    """
    reach = len(correlation) // 2
    for order_step in range(step, max(reach, step) + 2):
        kept = reach // order_step * order_step
        places = np.arange(reach - kept, reach + kept + 1, order_step)
        part = correlation[np.ix_(places, places)]
        width = float(np.sqrt(max(part.sum(), 1.0)))
        stride = 2 ** max(1, int(np.ceil(np.log2(width) - 1e-9)))
        radius = max(SMALLEST_RADIUS, RADIUS_STEP * float(np.ceil(RADIUS_PER_WIDTH * width / RADIUS_STEP)))
        order = Order(order_step, stride, NUMBERS[-1], radius, support)
        if _variances(order, part).min() >= support:
            break
    if order.step > 1:
        # There are few pixels then, for whatever they cost.
        return order
    share = np.array([1 / lattice.stride**2 for lattice in lattices(order)])
    spreads = [0.5 * float(share @ np.log(_variances(order._replace(number=number), part))) for number in NUMBERS]
    for number, now, more in zip(NUMBERS, spreads, spreads[1:], strict=False):
        if now - more < CLOSE_ENOUGH:
            return order._replace(number=number)
    return order


def _variances(order: Order, correlation: np.ndarray) -> np.ndarray:
    """Return the variance of a pixel of each lattice, those given from which it is predicted; 0 if that is impossible."""
    band, origin = correlation[:, :, None, None], np.zeros((1, 2), int)
    blocks = [_blocks(band, offsets, origin) + JITTER * np.eye(len(offsets)) for offsets in neighbors(order)]
    try:
        return np.array([_last_rows(block[None])[0, -1] ** -2 for block in blocks])
    except np.linalg.LinAlgError:
        return np.zeros(len(blocks))


class AbstractWhitening(eqx.Module):
    """A triangular matrix that whitens images, shape (channel, y, x)."""

    @abstractmethod
    def __call__(self, image: Float[Array, "channel y x"]) -> Float[Array, "channel y x"]:
        """Return the whitened image; 0 at pixels that are left out. It must be 0 at pixels without information."""

    @abstractmethod
    def diagonal(self) -> np.ndarray:
        """Return the diagonal, of which the determinant is the product, shape (channel or 1, y, x); 0 for pixels left out."""

    @property
    @abstractmethod
    def reach(self) -> int:
        """How many rows or columns a whitened pixel may be away from the pixels that it depends on."""


class DenseWhitening(AbstractWhitening):
    """The inverse of the Cholesky factor.

    Attributes
    ----------
    matrix : array, shape (channel or 1, y * x, y * x)
        Rows of 0 for pixels that are left out.
    shape : (int, int)
        Of images.
    """

    matrix: Float[Array, "channel p p"]
    shape: tuple[int, int] = eqx.field(static=True)

    def __call__(self, image):  # noqa: D102
        flat = image.reshape(len(image), -1)
        matrix = jnp.broadcast_to(self.matrix, (len(image), *self.matrix.shape[1:]))
        return jnp.einsum("cpq,cq->cp", matrix, flat, precision="highest").reshape(image.shape)

    def diagonal(self):  # noqa: D102
        return np.diagonal(np.asarray(self.matrix, dtype=float), axis1=1, axis2=2).reshape(-1, *self.shape)

    @property
    def reach(self):  # noqa: D102
        return max(self.shape) - 1


class SparseWhitening(AbstractWhitening):
    """Rows with few elements: `sum_k coefficients[lattice][channel, k, i, j] image[y + dy_k, x + dx_k]`.

    Attributes
    ----------
    coefficients : tuple of arrays, shape (channel or 1, neighbor, i, j)
        One for each lattice, by its rows and columns; 0 for pixels that are left out.
    order : Order
        Which fixes the lattices and the offsets of `neighbors`.
    shape : (int, int)
        Of images.
    """

    coefficients: tuple[Float[Array, "channel _ _ _"], ...]
    order: Order = eqx.field(static=True)
    shape: tuple[int, int] = eqx.field(static=True)

    def __call__(self, image):  # noqa: D102
        step = self.order.step
        image = image[..., ::step, ::step]
        functions = _forward(self.order, image.shape[-2:]), _backward(self.order, image.shape[-2:])
        whitened = linear_map(*functions, self.coefficients, (image,))[0]
        if step == 1:
            return whitened
        return jnp.zeros((len(image), *self.shape), image.dtype).at[..., ::step, ::step].set(whitened)

    def diagonal(self):  # noqa: D102
        result, step = np.zeros((len(self.coefficients[0]), *self.shape)), self.order.step
        for (stride, (y, x)), rows in zip(lattices(self.order), self.coefficients, strict=True):
            part = result[:, ::step, ::step][:, y::stride, x::stride]
            part[...] = np.asarray(rows, dtype=float)[:, -1, : part.shape[1], : part.shape[2]]
        return result

    @property
    def reach(self):  # noqa: D102
        return self.order.step * int(max(np.abs(offsets).max() for offsets in neighbors(self.order)))


def whitening(
    bands: Callable[[int], list[np.ndarray]], valid: np.ndarray, order: Order, progress: bool = False
) -> DenseWhitening | SparseWhitening:
    """Return the whitening of images that are known at some pixels only.

    Parameters
    ----------
    bands : callable
        Returns for a step the correlations (see the module) of every so-manieth row and column with one another: one array for
        each channel, or one for all.
    valid : array of bool, shape (channel, y, x)
    order : Order
        See `choose_order`.
    progress : bool
        Whether to show a progress bar on standard error, if it takes more than `progress.DELAY_SECONDS`.

    Raises
    ------
    ValueError
        If a correlation isn't positive definite.
    """
    shape = valid.shape[1:]
    is_dense = shape[0] * shape[1] <= MAX_DENSE
    planes = bands(1 if is_dense else order.step)
    same = len(planes) == 1 and bool((valid == valid[:1]).all())
    pairs = [(planes[min(c, len(planes) - 1)], valid[c]) for c in range(1 if same else len(valid))]
    try:
        if is_dense:
            return DenseWhitening(as_floats(np.stack([_dense(band, plane, order) for band, plane in pairs])), shape)
        pairs = [(band, plane[:: order.step, :: order.step]) for band, plane in pairs]
        total = sum(int(plane.sum()) for _, plane in pairs)
        options = {"disable": not progress, "delay": DELAY_SECONDS, "leave": False}
        with tqdm(total=total, desc="whitening", unit="pixel", **options) as bar:
            sparse = [_sparse(band, plane, order, bar) for band, plane in pairs]
    except np.linalg.LinAlgError as exc:
        raise ValueError(NOT_POSITIVE) from exc
    return SparseWhitening(tuple(as_floats(np.stack(rows)) for rows in zip(*sparse, strict=True)), order, shape)


def _dense(band: np.ndarray, valid: np.ndarray, order: Order) -> np.ndarray:
    """Return the inverse of the Cholesky factor, shape (y x, y x)."""
    height, width = valid.shape
    y, x = np.nonzero(valid)
    sequence = np.lexsort((x, y, lattice_number(order, y, x)))
    points = np.stack([y, x], axis=-1)[sequence]
    covariance = _block(band, points[None] - points[:, None], points[:, None])
    try:
        factor = np.linalg.cholesky(covariance)
        kept = np.arange(len(points))
    except np.linalg.LinAlgError:
        factor = None
    if factor is None or (np.diag(factor) ** 2 < order.support).any():
        factor, kept = _supported_factor(covariance, order.support)
    inverse = scipy.linalg.solve_triangular(factor, np.eye(len(kept)), lower=True)
    numbers = points[kept] @ [width, 1]
    result = np.zeros((height * width, height * width))
    result[np.ix_(numbers, numbers)] = inverse
    return result


def _supported_factor(covariance: np.ndarray, support: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the Cholesky factor of those rows that say something new, and which they are."""
    factor, kept = np.zeros_like(covariance), []
    for number, row in enumerate(covariance):
        count = len(kept)
        part = scipy.linalg.solve_triangular(factor[:count, :count], row[kept], lower=True) if count else np.zeros(0)
        variance = row[number] - part @ part
        if variance >= support:
            factor[count, :count], factor[count, count] = part, np.sqrt(variance)
            kept.append(number)
    return factor[: len(kept), : len(kept)], np.array(kept, int)


def _sparse(band: np.ndarray, valid: np.ndarray, order: Order, bar: tqdm) -> list[np.ndarray]:
    """Return the coefficients of each lattice, shape (neighbor, i, j); the bar counts pixels."""
    margin = int(np.ceil(order.radius))
    known = np.pad(valid, margin)
    result = []
    for (stride, first), offsets in zip(lattices(order), neighbors(order), strict=True):
        coefficients = np.zeros(
            (len(offsets), *(-(-n // order.stride) * (order.stride // stride) for n in valid.shape))
        )
        i, j = np.nonzero(valid[first[0] :: stride, first[1] :: stride])
        points = np.stack([first[0] + stride * i, first[1] + stride * j], axis=-1)
        for _ in range(2):
            # Pixels that say nothing new must not be used by others of their lattice: these are done again.
            beside = points[:, None] + offsets + margin
            use = known[beside[..., 0], beside[..., 1]]
            values = _predictions(band, offsets, points, use, bar)
            lost = values[:, -1] ** -2.0 < order.support
            known[points[lost, 0] + margin, points[lost, 1] + margin] = False
            points, values, i, j = points[~lost], values[~lost], i[~lost], j[~lost]
            if not lost.any():
                break
            bar.total += len(points)
        coefficients[:, i, j] = values.T
        result.append(coefficients)
    return result


def _predictions(band: np.ndarray, offsets: np.ndarray, points: np.ndarray, use: np.ndarray, bar: tqdm) -> np.ndarray:
    """Return the rows of the whitening for points (n, 2), given which of their neighbors they may use, shape (n, neighbor)."""
    if band.shape[2:] == (1, 1) and len(points):
        # Where correlations are the same everywhere, rows differ by what is masked alone.
        patterns, which = np.unique(np.packbits(use, axis=1), axis=0, return_index=True, return_inverse=True)[1:]
        bar.update(len(points) - len(patterns))
        rows = _predictions_of(band, offsets, np.zeros((len(patterns), 2), int), use[patterns], bar)
        return rows[which.ravel()]
    return _predictions_of(band, offsets, points, use, bar)


def _predictions_of(band, offsets, points, use, bar) -> np.ndarray:
    """Return the rows of the whitening, batch by batch."""
    result = np.zeros(use.shape)
    diagonal = np.arange(len(offsets))
    for start in range(0, len(points), BATCH):
        part = slice(start, start + BATCH)
        both = use[part, :, None] & use[part, None, :]
        # Pixels that may not be used become independent of all others.
        blocks = np.where(both, _blocks(band, offsets, points[part], use[part]), 0.0)
        blocks[:, diagonal, diagonal] += np.where(use[part], 0.0, 1.0) + JITTER
        result[part] = np.where(use[part], _last_rows(blocks), 0.0)
        bar.update(len(blocks))
    return result


def _blocks(band, offsets, points, use=None) -> np.ndarray:
    """Return the correlations of the neighbors of points, ([n,] neighbor, neighbor): of all points if they are the same."""
    lags = offsets[None] - offsets[:, None]
    if band.shape[2:] == (1, 1):
        return _block(band, lags, None)
    places = points[:, None, None] + offsets[:, None]
    if use is not None:
        places = np.where(use[:, :, None, None], places, 0)
    return _block(band, lags, places)


def _block(band, lags, places) -> np.ndarray:
    """Return the correlations of pixels at `places` with those `lags` away; 0 beyond the band."""
    reach_y, reach_x = (n // 2 for n in band.shape[:2])
    near = (np.abs(lags[..., 0]) <= reach_y) & (np.abs(lags[..., 1]) <= reach_x)
    lag_y, lag_x = np.where(near, lags[..., 0], 0) + reach_y, np.where(near, lags[..., 1], 0) + reach_x
    if band.shape[2:] == (1, 1):
        return np.where(near, band[lag_y, lag_x, 0, 0], 0.0)
    return np.where(near, band[lag_y, lag_x, places[..., 0], places[..., 1]], 0.0)


def _last_rows(blocks: np.ndarray) -> np.ndarray:
    """Return the last rows of the inverse Cholesky factors of matrices, shape (n, k, k)."""
    factor = np.linalg.cholesky(blocks)
    count, size, _ = blocks.shape
    rows = np.zeros((count, size))
    for k in range(size - 1, -1, -1):
        rest = np.einsum("nj,nj->n", factor[:, k + 1 :, k], rows[:, k + 1 :])
        rows[:, k] = ((k == size - 1) - rest) / factor[:, k, k]
    return rows


def _phases(image, stride: int):
    """Return an image (..., y, x) as its lattices of one stride, shape (stride * stride, ..., y / stride, x / stride)."""
    *leading, height, width = image.shape
    split = image.reshape(*leading, height // stride, stride, width // stride, stride)
    split = jnp.moveaxis(split, (-3, -1), (0, 1))
    return split.reshape(stride * stride, *leading, height // stride, width // stride)


def _joined(phases, stride: int):
    """Return the image of which these are the `_phases`."""
    _, *leading, rows, columns = phases.shape
    split = phases.reshape(stride, stride, *leading, rows, columns)
    return jnp.moveaxis(split, (0, 1), (-3, -1)).reshape(*leading, rows * stride, columns * stride)


class _Geometry(NamedTuple):
    """Where the pixels are that whitened images of one shape are made of: in phases of padded images."""

    margin: int
    padding: tuple[tuple[int, int], tuple[int, int]]
    starts: tuple[np.ndarray, ...]
    sizes: tuple[tuple[int, int], ...]


@functools.cache
def _geometry(order: Order, shape: tuple[int, int]) -> _Geometry:
    """Return the geometry; each row of `starts` is (phase, first row, first column) of a neighbor."""
    margin = -(-int(max(np.abs(offsets).max() for offsets in neighbors(order))) // order.stride) * order.stride
    full = [-(-n // order.stride) * order.stride for n in shape]
    starts, sizes = [], []
    for (stride, first), offsets in zip(lattices(order), neighbors(order), strict=True):
        y, x = (first + offsets + margin).T
        starts.append(
            np.stack([(y % stride) * stride + x % stride, y // stride, x // stride], axis=-1).astype(np.int32)
        )
        sizes.append((full[0] // stride, full[1] // stride))
    below, right = (margin + n - size for n, size in zip(full, shape, strict=True))
    return _Geometry(margin, ((margin, below), (margin, right)), tuple(starts), tuple(sizes))


# `linear_map` wants the same function for the same shape.
@functools.cache
def _forward(order: Order, shape: tuple[int, int]):
    """Return the whitening of images (..., channel, y, x), given its coefficients."""
    geometry = _geometry(order, shape)

    def forward(coefficients, arguments):
        (image,) = arguments
        padded = jnp.pad(image, ((0, 0),) * (image.ndim - 2) + geometry.padding)
        phases = {stride: _phases(padded, stride) for stride, _ in lattices(order)}
        parts = []
        for (stride, _), rows, starts, size in zip(
            lattices(order), coefficients, geometry.starts, geometry.sizes, strict=True
        ):
            source, places = phases[stride], jnp.asarray(starts)
            zero, leading = jnp.zeros((), jnp.int32), image.shape[:-2]

            def add(k, total, source=source, places=places, rows=rows, size=size, zero=zero, leading=leading):
                place = (places[k, 0], *[zero] * len(leading), places[k, 1], places[k, 2])
                return total + rows[:, k] * lax.dynamic_slice(source, place, (1, *leading, *size))[0]

            parts.append(lax.fori_loop(0, len(starts), add, jnp.zeros((*leading, *size), image.dtype)))
        result, *finer = parts
        for first in range(0, len(finer), 3):
            result = _interleaved(result, *finer[first : first + 3])
        return (result[..., : shape[0], : shape[1]],)

    return forward


def _interleaved(even, both, columns, rows):
    """Return the image of the lattice of half the stride from those at (0, 0), (1, 1), (0, 1) and (1, 0)."""
    return _joined(jnp.stack([even, columns, rows, both]), 2)


@functools.cache
def _backward(order: Order, shape: tuple[int, int]):
    """Return the transpose of `_forward`."""
    geometry = _geometry(order, shape)

    def backward(coefficients, arguments):
        (image,) = arguments
        leading = image.shape[:-2]
        inside = tuple((0, n[1] - geometry.margin) for n in geometry.padding)
        full = jnp.pad(image, ((0, 0),) * len(leading) + inside)
        padded = [full.shape[-2 + axis] + 2 * geometry.margin for axis in (0, 1)]
        totals = {}
        for (stride, (y, x)), rows, starts, size in zip(
            lattices(order), coefficients, geometry.starts, geometry.sizes, strict=True
        ):
            part, places = full[..., y::stride, x::stride], jnp.asarray(starts)
            zero = jnp.zeros((), jnp.int32)

            def add(k, total, part=part, places=places, rows=rows, size=size, zero=zero):
                place = (places[k, 0], *[zero] * len(leading), places[k, 1], places[k, 2])
                now = lax.dynamic_slice(total, place, (1, *leading, *size))
                return lax.dynamic_update_slice(total, now + rows[:, k] * part, place)

            blank = jnp.zeros((stride**2, *leading, *(n // stride for n in padded)), image.dtype)
            totals[stride] = lax.fori_loop(0, len(starts), add, totals.get(stride, blank))
        first, *others = (_joined(total, stride) for stride, total in totals.items())
        result = sum(others, first)
        window = tuple(slice(geometry.margin, geometry.margin + n) for n in shape)
        return (result[(..., *window)],)

    return backward
