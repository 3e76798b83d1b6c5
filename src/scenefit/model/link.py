"""Links: a parameter of a morphology as a function of wavelength."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import equinox as eqx
import numpy as np
import scipy.interpolate
from jaxtyping import Array

from scenefit.sky import units
from scenefit.sky.frame import Channel, band_of


class AbstractLink(eqx.Module):
    """A parameter that differs between bands, linear in the numbers `values`.

    Attributes
    ----------
    values : array, shape (k, ...)
        What is fitted, in the parameter's own unit; constraint and prior of the parameter hold for each of the k.
    """

    values: eqx.AbstractVar[np.ndarray | Array]

    @abstractmethod
    def basis(self, channels: Sequence[Channel]) -> np.ndarray:
        """Return the matrix, shape (channel, k), that turns `values` into the parameter in each channel.

        Raises
        ------
        ValueError
            If the band of a channel is unknown.
        """


def with_values(link: AbstractLink, values) -> AbstractLink:
    """Return a link with other values of the same shape."""
    return eqx.tree_at(lambda each: each.values, link, values)


class AbstractCurve(AbstractLink):
    """A parameter as a function of wavelength.

    Attributes
    ----------
    wavelengths : dict of float
        In microns, by band.
    """

    wavelengths: eqx.AbstractVar[dict[str, float]]

    @abstractmethod
    def basis_at(self, wavelengths) -> np.ndarray:
        """Return the matrix, shape (m, k), that turns `values` into the parameter at m wavelengths (microns)."""

    def basis(self, channels):  # noqa: D102
        return self.basis_at([self.wavelengths[_band(c, self.wavelengths, type(self).__name__)] for c in channels])

    def evaluate(self, wavelengths) -> np.ndarray:
        """Return the parameter at wavelengths (microns, or a Quantity), shape (m, ...)."""
        return np.tensordot(self.basis_at(wavelengths), np.asarray(self.values), axes=1)


class PerBand(AbstractLink):
    """A free value in every band.

    Parameters
    ----------
    values : mapping of band name to value
    """

    values: np.ndarray | Array
    bands: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, values: Mapping[str, object] | np.ndarray | Array, bands: Sequence[str] | None = None):
        if isinstance(values, Mapping):
            shapes = {np.shape(np.asarray(value)) for value in values.values()}
            if len(shapes) != 1:
                raise ValueError(
                    f"PerBand wants values of one shape for at least one band; got shapes {sorted(shapes)}."
                )
            self.bands = tuple(str(band) for band in values)
            self.values = np.stack([np.asarray(value, dtype=float) for value in values.values()])
        else:
            self.bands, self.values = tuple(bands or ()), _as_values(values)
        if len(self.bands) != len(self.values) or len(set(self.bands)) < len(self.bands):
            raise ValueError(
                f"PerBand wants one value for each of distinct bands; got {len(self.values)} for {self.bands}."
            )

    def basis(self, channels):  # noqa: D102
        bands = [_band(channel, self.bands, "PerBand") for channel in channels]
        return np.array([[float(band == own) for own in self.bands] for band in bands])


class Polynomial(AbstractCurve):
    """A polynomial in wavelength, given by its values at as many wavelengths (`knots`) as it has coefficients.

    The knots are the Chebyshev-Lobatto points from the shortest to the longest wavelength, or the wavelengths themselves if
    there are as many. Priors and constraints hold for the parameter there; in between, orders above 1 may leave them.

    Parameters
    ----------
    values : array, shape (order + 1, ...)
        The parameter at `knots`, by increasing wavelength.
    wavelengths : mapping of band name to wavelength or Quantity
        In microns if they are plain numbers. All bands of the model must be there.

    Raises
    ------
    ValueError
        If there are fewer wavelengths than values, or one repeats or isn't positive.
    """

    values: np.ndarray | Array
    wavelengths: dict[str, float]

    def __init__(self, values, wavelengths: Mapping[str, object]):
        self.values = _as_values(values)
        self.wavelengths = _check_wavelengths(wavelengths, len(self.values), "Polynomial")

    @classmethod
    def constant(cls, value, order: int, wavelengths: Mapping[str, object]) -> Polynomial:
        """Build the polynomial of that order that has one value everywhere: a start for a fit."""
        return cls(_repeated(value, _check_order(order) + 1), wavelengths)

    @property
    def order(self) -> int:
        """Highest power of the wavelength."""
        return len(self.values) - 1

    @property
    def knots(self) -> np.ndarray:
        """Wavelengths, in microns, at which the polynomial has the `values`; shape (order + 1,)."""
        bands, count = np.sort(list(self.wavelengths.values())), len(self.values)
        if count == len(bands):
            return bands
        middle, half = 0.5 * (bands[0] + bands[-1]), 0.5 * (bands[-1] - bands[0])
        return middle - half * np.cos(np.pi * np.arange(count) / (count - 1)) if count > 1 else np.array([middle])

    def basis_at(self, wavelengths) -> np.ndarray:  # noqa: D102
        at, knots = _microns(wavelengths)[:, None], self.knots
        others = [np.delete(knots, n) for n in range(len(knots))]
        return np.stack([np.prod((at - o) / (k - o), axis=1) for k, o in zip(knots, others, strict=True)], axis=1)


class BSpline(AbstractCurve):
    """A clamped B-spline in wavelength with uniform knots between the shortest and the longest.

    Between the smallest and the largest of the values everywhere, so that constraints on these hold for the curve.

    Parameters
    ----------
    values : array, shape (k, ...)
        Coefficients, by increasing wavelength; the first and the last are the values at the ends.
    wavelengths : mapping of band name to wavelength or Quantity
        In microns if they are plain numbers.
    degree : int
        At most k - 1.

    Raises
    ------
    ValueError
        If there are fewer wavelengths than values, one repeats or isn't positive, or the degree is too high.
    """

    values: np.ndarray | Array
    wavelengths: dict[str, float]
    degree: int = eqx.field(static=True)

    def __init__(self, values, wavelengths: Mapping[str, object], degree: int = 3):
        self.values = _as_values(values)
        self.wavelengths = _check_wavelengths(wavelengths, len(self.values), "BSpline")
        self.degree = _check_order(degree)
        if len(self.values) < 2:
            raise ValueError(
                "A BSpline wants at least two values; a parameter that is the same everywhere needs no link."
            )
        if not 1 <= self.degree < len(self.values):
            raise ValueError(
                f"A BSpline of {len(self.values)} values has a degree from 1 to {len(self.values) - 1}; got {degree}."
            )

    @classmethod
    def constant(cls, value, count: int, wavelengths: Mapping[str, object], degree: int = 3) -> BSpline:
        """Build the spline of `count` coefficients that has one value everywhere: a start for a fit."""
        return cls(_repeated(value, count), wavelengths, min(degree, count - 1))

    def basis_at(self, wavelengths) -> np.ndarray:  # noqa: D102
        low, high = min(self.wavelengths.values()), max(self.wavelengths.values())
        inner = np.linspace(low, high, len(self.values) - self.degree + 1)
        knots = np.concatenate([[low] * self.degree, inner, [high] * self.degree])
        at = _microns(wavelengths)
        if at.min() < low or at.max() > high:
            raise ValueError(f"A BSpline is known from {low} to {high} micron only; got {at.min()} to {at.max()}.")
        return scipy.interpolate.BSpline.design_matrix(at, knots, self.degree).toarray()


def _as_values(values):
    """Return the values of a link as an array with at least one axis."""
    values = values if isinstance(values, Array) else np.asarray(values, dtype=float)
    if values.ndim < 1 or len(values) < 1:
        raise ValueError(f"A link wants values of shape (k, ...), k >= 1; got shape {values.shape}.")
    return values


def _repeated(value, count) -> np.ndarray:
    """Return a value `count` times."""
    value = np.asarray(value, dtype=float)
    return np.broadcast_to(value, (count, *value.shape)).copy()


def _check_order(order) -> int:
    """Return an order or degree as an integer of at least 0."""
    if not isinstance(order, int | np.integer) or order < 0:
        raise ValueError(f"An order is an integer of at least 0; got {order!r}.")
    return int(order)


def _microns(wavelengths) -> np.ndarray:
    """Return wavelengths in microns, shape (m,)."""
    return np.atleast_1d(units.to_microns(wavelengths, "A wavelength"))


def _check_wavelengths(wavelengths, count, name) -> dict[str, float]:
    """Return the wavelengths in microns by band."""
    if not isinstance(wavelengths, Mapping):
        raise TypeError(f"{name} wants wavelengths as a mapping from band to wavelength; got {wavelengths!r}.")
    result = {str(band): float(_microns(value)[0]) for band, value in wavelengths.items()}
    values = list(result.values())
    if not all(np.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"The wavelengths of a {name} must be positive; got {result}.")
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        bands = [band for band, value in result.items() if value in repeated]
        raise ValueError(f"The wavelengths of a {name} must be distinct; bands {bands} share {repeated} micron.")
    if count > len(values):
        raise ValueError(
            f"A {name} of {count} values (order {count - 1}) wants at least {count} bands; got {len(values)}: {list(result)}. "
            "Lower the order."
        )
    return result


def _band(channel: Channel, known, name) -> str:
    """Return the band of a channel."""
    band = band_of(channel)
    if band not in known:
        raise ValueError(f"{name} knows the bands {list(known)}; the model also has {channel!r}. Add its wavelength.")
    return band
