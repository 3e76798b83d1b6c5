"""How the noise of pixels is correlated: the same everywhere, or as a linear map makes it of independent noise."""

from __future__ import annotations

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float
from scipy import ndimage

from scenefit.arrays.fourier import fast_length
from scenefit.arrays.vecchia import Order, choose_order
from scenefit.data.weights import as_weights

NEGLIGIBLE = 1e-6
"""Correlations below this fraction are none."""
NEGATIVE = 1e-5
"""Power spectra that are negative by no more than this fraction of their mean are so by rounding."""
SUPPORT, SUPPORT_OF_SUMS = 5e-4, 0.06
"""What `Order.support` is for correlation functions, and for weighted sums: these may have more pixels than there are numbers
that they are made of, and are whitened best if as many pixels are used."""
OVERSAMPLED, CRITICAL = 2.0, 1.05
"""From so many pixels to an independent number on, along each axis, only every n-th row and column of them is whitened: n is the
smallest that leaves fewer than the second number to an independent one, so that these are independent enough."""
FINENESS = 8
"""Frequencies at which a power spectrum is computed, for each lag of the correlation function: interpolated between them."""
SAMPLED_PIXELS = 400
"""Pixels about which correlations that differ from place to place are averaged."""


class AbstractCorrelation(eqx.Module):
    """Correlation of the noise of the pixels of one image, channel by channel; independent between channels."""

    @property
    @abstractmethod
    def num_channels(self) -> int:
        """Number of channels; 1 stands for any number."""

    @abstractmethod
    def average(self) -> np.ndarray:
        """Return the correlation with pixels (dy, dx) away, on the average, shape (channel, 2 R + 1, 2 R + 1)."""

    @abstractmethod
    def orders(self, average: np.ndarray) -> list[Order]:
        """Return for each channel, given its `average`, how it is best whitened: see `arrays.vecchia`."""

    @abstractmethod
    def bands(self, step: int) -> list[np.ndarray]:
        """Return the correlations among every `step`-th row and column, one array a channel: see `arrays.vecchia`."""

    @abstractmethod
    def window(self, window: tuple[slice, slice]) -> AbstractCorrelation:
        """Return the correlation of a part of the image."""

    @abstractmethod
    def sample(self, key: Array, shape: tuple[int, int, int]) -> Float[Array, "channel y x"]:
        """Draw noise of unit variance for an image of shape (channel, y, x)."""


class StationaryCorrelation(AbstractCorrelation):
    """The same correlation function everywhere.

    Parameters
    ----------
    function : array, shape (2 R + 1, 2 R + 1) or (channel, 2 R + 1, 2 R + 1)
        Correlation (or covariance: it is divided by the value in the middle) of pixels (dy, dx) away, no lag in the middle;
        0 beyond. Rectangles with an odd number of rows and of columns will do.

    Raises
    ------
    ValueError
        If it isn't finite, symmetric about a positive middle, and positive definite.
    """

    function: np.ndarray

    def __init__(self, function):
        function = np.asarray(function, dtype=float)
        function = function[None] if function.ndim == 2 else function
        if function.ndim != 3 or any(n % 2 == 0 for n in function.shape[1:]):
            raise ValueError(
                "A correlation function wants an odd number of rows and of columns, no lag in the middle, shape "
                f"(2 R + 1, 2 R + 1) or (channel, 2 R + 1, 2 R + 1); got {function.shape}."
            )
        middle = function[:, function.shape[1] // 2, function.shape[2] // 2]
        if not np.isfinite(function).all() or not (middle > 0).all():
            raise ValueError("A correlation function wants finite values, with a positive one in the middle.")
        function = function / middle[:, None, None]
        if not np.allclose(function, function[:, ::-1, ::-1], rtol=0, atol=1e-4):
            raise ValueError("A correlation function must be the same at opposite lags: f(-dy, -dx) = f(dy, dx).")
        function = 0.5 * (function + function[:, ::-1, ::-1])
        # Before it is trimmed: many negligible values together aren't.
        power = torus_power(function, (4 * function.shape[1], 4 * function.shape[2]))
        if (lowest := power.min()) < -NEGATIVE:
            raise ValueError(
                f"The correlation function isn't positive definite: its power spectrum goes down to {lowest:.2g} of the mean "
                "power. Give one that was measured through `CorrelatedNoise.measured`, or taper it."
            )
        self.function = _trimmed(function)

    @property
    def num_channels(self) -> int:  # noqa: D102
        return len(self.function)

    def average(self) -> np.ndarray:  # noqa: D102
        reach = max(self.function.shape[1:]) // 2
        margins = [(reach - n // 2, reach - n // 2) for n in self.function.shape[1:]]
        return np.pad(self.function, [(0, 0), *margins])

    def orders(self, average):  # noqa: D102
        return [choose_order(each, SUPPORT) for each in average]

    def bands(self, step):  # noqa: D102
        reach = [n // 2 // step * step for n in self.function.shape[1:]]
        rows, columns = (
            np.arange(n // 2 - r, n // 2 + r + 1, step) for n, r in zip(self.function.shape[1:], reach, strict=True)
        )
        return [each[np.ix_(rows, columns)][:, :, None, None] for each in self.function]

    def window(self, window):  # noqa: D102
        return self

    def sample(self, key, shape):  # noqa: D102
        # On a torus on which opposite edges of the image are out of each other's reach.
        height, width = (fast_length(n + m // 2) for n, m in zip(shape[1:], self.function.shape[1:], strict=True))
        torus = height, width
        gain = np.sqrt(np.maximum(torus_power(self.function, torus), 0.0))
        noise = jax.random.normal(key, (shape[0], *torus))
        colored = jnp.fft.irfft2(jnp.fft.rfft2(noise) * gain[:, :, : width // 2 + 1], torus)
        return colored[:, : shape[1], : shape[2]]


class PropagatedCorrelation(AbstractCorrelation):
    """That of pixels which are weighted sums of independent noise.

    Parameters
    ----------
    index : array of int, shape (y * x, k)
        Which of the independent numbers each pixel is made of.
    weight : array, shape (channel, y * x, k)
        Their weights times their standard deviations; 0 for those that don't count.
    shape : (int, int)
        Rows and columns of pixels.
    step : int
        Every how many rows and columns are used: see `Order`. About the number of pixels to an independent number along an axis.
    """

    index: np.ndarray
    weight: np.ndarray
    shape: tuple[int, int] = eqx.field(static=True)
    step: int = eqx.field(static=True)

    def __init__(self, index, weight, shape: tuple[int, int], step: int = 1):
        index, weight = np.asarray(index, np.int32), np.asarray(weight, float)
        weight = weight[None] if weight.ndim == 2 else weight
        if index.shape != (shape[0] * shape[1], weight.shape[2]) or weight.shape[1:] != index.shape:
            raise ValueError(
                f"index (y * x, k) and weight (channel, y * x, k) don't go with {shape[0]} x {shape[1]} pixels: got shapes "
                f"{index.shape} and {weight.shape}."
            )
        norm = np.sqrt((weight**2).sum(axis=2, keepdims=True))
        self.index, self.weight = index, weight / np.where(norm > 0, norm, 1.0)
        self.shape, self.step = shape, step

    @property
    def num_channels(self) -> int:  # noqa: D102
        return len(self.weight)

    def average(self) -> np.ndarray:  # noqa: D102
        result = []
        for channel in range(self.num_channels):
            rows = self._rows(channel)
            some = np.flatnonzero((self.weight[channel] != 0).any(axis=1))
            some = some[np.unique(np.linspace(0, len(some) - 1, SAMPLED_PIXELS).astype(int))] if len(some) else some
            result.append(_mean_band(rows[some] @ rows.T, some, self.shape) if len(some) else np.ones((1, 1)))
        reach = max(len(each) // 2 for each in result)
        return np.stack([np.pad(each, reach - len(each) // 2) for each in result])

    def orders(self, average):  # noqa: D102
        return [choose_order(each, SUPPORT_OF_SUMS, self.step) for each in average]

    def bands(self, step):  # noqa: D102
        numbers = np.arange(self.shape[0] * self.shape[1]).reshape(self.shape)[::step, ::step]
        result = []
        for channel in range(self.num_channels):
            rows = self._rows(channel)[numbers.ravel()]
            result.append(_band((rows @ rows.T).tocoo(), numbers.shape))
        return result

    def window(self, window):  # noqa: D102
        numbers = np.arange(self.shape[0] * self.shape[1]).reshape(self.shape)[window]
        shape = (int(numbers.shape[0]), int(numbers.shape[1]))
        return PropagatedCorrelation(self.index[numbers.ravel()], self.weight[:, numbers.ravel()], shape, self.step)

    def sample(self, key, shape):  # noqa: D102
        count = int(self.index.max()) + 1
        noise = np.asarray(jax.random.normal(key, (shape[0], count)), dtype=float)
        weight = np.broadcast_to(self.weight, (shape[0], *self.weight.shape[1:]))
        sums = [(plane[self.index] * w).sum(axis=1) for plane, w in zip(noise, weight, strict=True)]
        return jnp.asarray(np.stack(sums).reshape(shape), jnp.result_type(float))

    def _rows(self, channel: int) -> scipy.sparse.csr_matrix:
        """Return the map from independent numbers to pixels."""
        pixel = np.repeat(np.arange(len(self.index)), self.index.shape[1])
        entries = (self.weight[channel].ravel(), (pixel, self.index.ravel()))
        return scipy.sparse.coo_matrix(entries, shape=(len(self.index), int(self.index.max()) + 1)).tocsr()


def propagate(resampling, weights, shape: tuple[int, int]) -> tuple[np.ndarray, PropagatedCorrelation]:
    """Return inverse variances (channel, y, x) and correlation of sums of independent noise; see `CorrelatedNoise.propagated`."""
    matrix = _checked_resampling(resampling, shape)
    weights = as_weights(np.asarray(weights))
    if weights.ndim < 2 or np.prod(weights.shape[1:]) != matrix.shape[1]:
        raise ValueError(
            f"weights of the input want shape (channel, {matrix.shape[1]}), or (channel, y, x) of as many pixels as the "
            f"resampling has columns; got {weights.shape}."
        )
    weights = weights.reshape(len(weights), -1)
    counts = np.diff(matrix.indptr)
    # The shares of each pixel side by side, as many as the pixel has that needs most.
    row = np.repeat(np.arange(len(counts)), counts)
    place = row, np.arange(matrix.nnz) - matrix.indptr[row]
    index, share = (np.zeros((len(counts), max(counts.max(), 1)), kind) for kind in (int, float))
    index[place], share[place] = matrix.indices, matrix.data
    known = weights > 0
    sigma = np.where(known, 1 / np.sqrt(np.where(known, weights, 1.0)), 0.0)
    usable = (counts > 0) & ~((share != 0) & ~known[:, index]).any(axis=2)
    if not usable.any():
        raise ValueError("No pixel of the result is made of input with information alone; nothing to fit.")
    weight = np.where(usable[..., None], share * sigma[:, index], 0.0)
    variance = (weight**2).sum(axis=2)
    inverse = np.where(usable, 1 / np.where(usable, variance, 1.0), 0.0).reshape(-1, *shape)
    step = min(step_of(_density(index, *each)) for each in zip(weight**2, variance, strict=True))
    return inverse, PropagatedCorrelation(index, weight, shape, step)


def _density(index: np.ndarray, shares: np.ndarray, variance: np.ndarray) -> float:
    """Return how many pixels there are to an independent number along an axis, from the parts of their variance; 0 for none."""
    some = variance > 0
    total = np.bincount(index[some].ravel(), (shares[some] / variance[some, None]).ravel())
    # Numbers at the rim, which few pixels are made of, count by as much less.
    return float(np.sqrt((total**2).sum() / total.sum())) if some.any() else 0.0


def _checked_resampling(resampling, shape) -> scipy.sparse.csr_array:
    """Return a resampling with the shares that aren't 0 alone, each once."""
    if not scipy.sparse.issparse(resampling):
        raise TypeError(
            f"The resampling wants to be a sparse matrix of scipy, shape (y * x, input pixel); got a {type(resampling).__name__}."
        )
    if len(shape) != 2 or min(shape) < 1 or resampling.ndim != 2 or resampling.shape[0] != shape[0] * shape[1]:
        raise ValueError(
            f"The resampling wants a row for each pixel of the result, y * x of shape {tuple(shape)}; got {resampling.shape}."
        )
    matrix = scipy.sparse.csr_array(resampling, dtype=float, copy=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    if bad := int((~np.isfinite(matrix.data)).sum()):
        raise ValueError(f"The resampling wants finite shares of the input; {bad} are NaN or infinite.")
    return matrix


def step_of(density: float) -> int:
    """Return every how many rows and columns of pixels are whitened, given how many there are to an independent number."""
    return int(np.ceil(density / CRITICAL)) if density >= OVERSAMPLED else 1


def torus_power(function: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the power spectrum of a correlation function (channel, 2 Ry + 1, 2 Rx + 1) on a torus, shape (channel, *shape)."""
    image = np.zeros((len(function), *shape))
    rows, columns = (np.arange(-(n // 2), n // 2 + 1) % size for n, size in zip(function.shape[1:], shape, strict=True))
    # Lags that differ by a turn around the torus are one and the same there.
    for plane, values in zip(image, function, strict=True):
        np.add.at(plane, (rows[:, None], columns), values)
    return np.fft.fft2(image).real


LEAST_POWER = 1e-3
"""Power that a mode is taken to have at least, in units of the largest, where it is divided by."""


def power_at(function: np.ndarray, frequency_y: np.ndarray, frequency_x: np.ndarray, least: float = 0.0) -> np.ndarray:
    """Return the power spectrum of a correlation function at any frequencies, in units of that of independent pixels.

    Parameters
    ----------
    function : array, shape (channel, 2 R + 1, 2 R + 1)
    frequency_y, frequency_x : arrays of one shape
        Cycles per pixel.
    least : float
        Power that is returned at least, in units of the largest.

    Returns
    -------
    array, shape (channel, ...)
        Good to a percent or so of the largest power.
    """
    size = FINENESS * max(function.shape[1:])
    places = [size * np.asarray(each) for each in (frequency_y, frequency_x)]
    planes = torus_power(function, (size, size))
    power = np.stack([ndimage.map_coordinates(plane, places, order=1, mode="grid-wrap") for plane in planes])
    return np.maximum(power, least * power.max(axis=tuple(range(1, power.ndim)), keepdims=True))


def _trimmed(function: np.ndarray) -> np.ndarray:
    """Return the correlation function without the outer lags at which there is nothing."""
    significant = np.abs(function).max(axis=0) > NEGLIGIBLE
    for axis in (0, 1):
        middle = function.shape[1 + axis] // 2
        reach = int(np.abs(np.flatnonzero(significant.any(axis=1 - axis)) - middle).max())
        function = np.take(function, np.arange(middle - reach, middle + reach + 1), axis=1 + axis)
    return function


def _lags(first: np.ndarray, second: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return by how many rows and columns the second of two pixels, given by flat numbers, is away from the first."""
    return second // width - first // width, second % width - first % width


def _mean_band(products, pixels: np.ndarray, shape) -> np.ndarray:
    """Return the mean correlation of some pixels (rows of the sparse `products`) with others, by lag."""
    products = products.tocoo()
    dy, dx = _lags(pixels[products.row], products.col, shape[1])
    reach = int(max(np.abs(dy).max(initial=0), np.abs(dx).max(initial=0)))
    total = np.zeros((2 * reach + 1, 2 * reach + 1))
    np.add.at(total, (dy + reach, dx + reach), products.data)
    y, x = np.divmod(pixels, shape[1])
    lags = np.arange(-reach, reach + 1)
    in_rows, in_columns = (
        ((each + lags[:, None] >= 0) & (each + lags[:, None] < n)) for each, n in ((y, shape[0]), (x, shape[1]))
    )
    count = in_rows.astype(float) @ in_columns.T
    mean = total / np.maximum(count, 1.0)
    return 0.5 * (mean + mean[::-1, ::-1])


def _band(products, shape: tuple[int, int]) -> np.ndarray:
    """Return the correlations of pixels with those around them, from the sparse matrix of all."""
    dy, dx = _lags(products.row, products.col, shape[1])
    reach_y, reach_x = int(np.abs(dy).max(initial=0)), int(np.abs(dx).max(initial=0))
    band = np.zeros((2 * reach_y + 1, 2 * reach_x + 1, *shape))
    y, x = np.divmod(products.row, shape[1])
    band[dy + reach_y, dx + reach_x, y, x] = products.data
    return band
