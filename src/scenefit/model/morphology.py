"""Morphologies: how the light of a component is spread over model pixels, normalised to unit total."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import scipy.special
from jaxtyping import Array, Float
from numpyro.distributions import constraints

from scenefit.arrays import profiles
from scenefit.model.link import AbstractLink, with_values
from scenefit.model.parameters import ENVELOPE_FLOOR, ENVELOPE_SCATTER, unit_disk
from scenefit.sky import units
from scenefit.sky.frame import Channel

HALF_LIGHT_PER_SIGMA = float(np.sqrt(2 * np.log(2)))
"""Half-light radius of a Gaussian in units of its standard deviation."""
STAMP_FLUX_TOLERANCE = 5e-3
"""Fraction of a profile's flux that may fall outside its stamp; what does is still counted in `spectrum`. (Gaussians, points:
1e-5.)"""


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
            Coordinates of successive pixels relative to the source's centre, 1 apart.
        psf_sigma : float
            Standard deviation of the Gaussian model PSF, pixels.

        Returns
        -------
        array, shape (h, w)
            Flux per pixel; sums to 1 over an infinite grid.
        """

    @abstractmethod
    def radius(self, psf_sigma: float, tolerance: float | None = None) -> float:
        """Return the half-size, in pixels, of a stamp that holds all but a fraction `tolerance` of the flux.

        By default `STAMP_FLUX_TOLERANCE`, less for compact profiles. Called without links.
        """


def links(morphology: AbstractMorphology) -> dict[str, AbstractLink]:
    """Return the parameters of a morphology that are links, by name."""
    fields = {name: getattr(morphology, name) for name in morphology.constraints}
    return {name: value for name, value in fields.items() if isinstance(value, AbstractLink)}


def parameter_values(morphology: AbstractMorphology) -> dict[str, np.ndarray | Array]:
    """Return the parameters of a morphology by name; the values, shape (k, ...), of those that are links."""
    fields = {name: getattr(morphology, name) for name in morphology.constraints}
    return {name: value.values if isinstance(value, AbstractLink) else value for name, value in fields.items()}


def with_parameter_values(morphology: AbstractMorphology, values: dict) -> AbstractMorphology:
    """Return a morphology with other parameters, as `parameter_values` gives them."""
    present = links(morphology)
    new = {n: with_values(present[n], value) if n in present else value for n, value in values.items()}
    return _with_fields(morphology, new)


def with_arrays(morphology: AbstractMorphology) -> AbstractMorphology:
    """Return a morphology whose links are replaced by the arrays of their values."""
    return _with_fields(morphology, {name: link.values for name, link in links(morphology).items()})


def in_channels(morphology: AbstractMorphology, channels: Sequence[Channel]) -> list[AbstractMorphology]:
    """Return the morphology as it is in every channel, without links; once if it has none."""
    present = links(morphology)
    if not present:
        return [morphology]
    planes = {
        name: np.tensordot(link.basis(channels), np.asarray(link.values), axes=1) for name, link in present.items()
    }
    return [_with_fields(morphology, {name: plane[c] for name, plane in planes.items()}) for c in range(len(channels))]


def _with_fields(morphology, fields):
    """Return a morphology with other values of some fields."""
    if not fields:
        return morphology
    return eqx.tree_at(
        lambda m: [getattr(m, name) for name in fields],
        morphology,
        list(fields.values()),
        is_leaf=lambda leaf: isinstance(leaf, AbstractLink),
    )


class AbstractRingMorphology(AbstractMorphology):
    """A sum of elliptical Gaussians ("rings") of one centre and shape: all smooth profiles."""

    @abstractmethod
    def rings(self, count: int) -> tuple[np.ndarray | Array, Array]:
        """Return geometric mean semi-axis, in pixels, and fraction of the flux of every ring.

        Parameters
        ----------
        count : int
            How many of `profiles.ring_sigmas` to use, by profiles that are made of these.
        """

    @property
    @abstractmethod
    def shape(self) -> np.ndarray | Array:
        """Ellipticity `(1 - q^2) / (1 + q^2) (cos 2 theta, sin 2 theta)`, shape (2,)."""

    def evaluate(self, y, x, psf_sigma):  # noqa: D102
        # Rings twice as wide as the stamp: of wider ones the middle is known, even where they are flat.
        sigmas, weights = self.rings(profiles.num_rings(2 * max(len(y), len(x))))
        return profiles.evaluate_rings(y, x, sigmas, weights, self.shape, psf_sigma)


class PointMorphology(AbstractRingMorphology):
    """A point: the model PSF, band-limited.

    Samples of a Gaussian as narrow as the model PSF hold aliases: a tenth of its spectrum's peak is left at the Nyquist
    frequency. A point, and every other narrow profile, has these frequencies cut off instead.
    """

    constraints: ClassVar = {}

    def rings(self, count):  # noqa: D102
        return np.zeros(1), jnp.ones(1)

    @property
    def shape(self):  # noqa: D102
        return np.zeros(2)

    def radius(self, psf_sigma: float, tolerance: float | None = None) -> float:  # noqa: D102
        return profiles.ringing_radius(psf_sigma) + profiles.RINGING_FADE


class GaussianMorphology(AbstractRingMorphology):
    """An elliptical Gaussian.

    Parameters
    ----------
    half_light_radius : float or link
        Radius, in model pixels, of the ellipse that holds half the light, before the PSF: the geometric mean of its
        semi-axes. (The semi-major axis is `half_light_radius / sqrt(q)`; it isn't smooth where q = 1.)
    ellipticity : array, shape (2,), or link
        `(1 - q^2) / (1 + q^2) * (cos 2 theta, sin 2 theta)` with axis ratio q and theta counter-clockwise from +x.
    """

    half_light_radius: np.ndarray | Array | AbstractLink
    ellipticity: np.ndarray | Array | AbstractLink
    constraints: ClassVar = {"half_light_radius": constraints.positive, "ellipticity": unit_disk}

    def __init__(self, half_light_radius, ellipticity=(0.0, 0.0)):
        self.half_light_radius = as_parameter(half_light_radius, ())
        self.ellipticity = as_parameter(ellipticity, (2,))

    def rings(self, count):  # noqa: D102
        return jnp.asarray(self.half_light_radius)[None] / HALF_LIGHT_PER_SIGMA, jnp.ones(1)

    @property
    def shape(self):  # noqa: D102
        return self.ellipticity

    def radius(self, psf_sigma: float, tolerance: float | None = None) -> float:  # noqa: D102
        return _stamp_radius(self.half_light_radius, 0.5, self.ellipticity, psf_sigma, tolerance or CORE_FLUX_TOLERANCE)


class AbstractSersicMorphology(AbstractRingMorphology):
    """A Sersic profile of some index."""

    half_light_radius: eqx.AbstractVar[np.ndarray | Array | AbstractLink]
    ellipticity: eqx.AbstractVar[np.ndarray | Array | AbstractLink]

    @property
    @abstractmethod
    def index(self):
        """Sersic index."""

    def rings(self, count):  # noqa: D102
        return profiles.ring_sigmas(count), profiles.sersic_weights(self.index, self.half_light_radius, count)

    @property
    def shape(self):  # noqa: D102
        return self.ellipticity

    def radius(self, psf_sigma: float, tolerance: float | None = None) -> float:  # noqa: D102
        return _stamp_radius(self.half_light_radius, self.index, self.ellipticity, psf_sigma, tolerance)


class SersicMorphology(AbstractSersicMorphology):
    """A Sersic profile, `I(r) ~ exp(-b (r / half_light_radius)^(1/n))` on ellipses.

    Parameters
    ----------
    half_light_radius : float or link
        Radius, in model pixels, of the ellipse that holds half the light, before the PSF: the geometric mean of its
        semi-axes. (The semi-major axis is `half_light_radius / sqrt(q)`.)
    sersic_index : float or link
        n, from 0.4 to 8.
    ellipticity : array, shape (2,), or link
        `(1 - q^2) / (1 + q^2) * (cos 2 theta, sin 2 theta)` with axis ratio q and theta counter-clockwise from +x.

    Notes
    -----
    Evaluated as a sum of Gaussians (see `scenefit.arrays.profiles`), so that convolution with the model PSF is exact for
    radii and cusps of any size. The curve of growth is good to 2e-3 of the flux for n = 0.4, 6e-4 for n = 0.5 and 2e-5 for
    n >= 1.

    References
    ----------
    Sersic 1963, Bol. Asoc. Argent. Astron. 6, 41; Graham & Driver 2005, PASA 22, 118, doi:10.1071/AS05001.
    """

    half_light_radius: np.ndarray | Array | AbstractLink
    sersic_index: np.ndarray | Array | AbstractLink
    ellipticity: np.ndarray | Array | AbstractLink
    constraints: ClassVar = {
        "half_light_radius": constraints.positive,
        "sersic_index": constraints.interval(*profiles.SERSIC_RANGE),
        "ellipticity": unit_disk,
    }

    def __init__(self, half_light_radius, sersic_index, ellipticity=(0.0, 0.0)):
        self.half_light_radius = as_parameter(half_light_radius, ())
        self.sersic_index = as_parameter(sersic_index, ())
        self.ellipticity = as_parameter(ellipticity, (2,))

    @property
    def index(self):  # noqa: D102
        return self.sersic_index


class ExponentialMorphology(AbstractSersicMorphology):
    """An exponential disk: a Sersic profile of index 1. Parameters as in `SersicMorphology`."""

    half_light_radius: np.ndarray | Array | AbstractLink
    ellipticity: np.ndarray | Array | AbstractLink
    constraints: ClassVar = {"half_light_radius": constraints.positive, "ellipticity": unit_disk}

    def __init__(self, half_light_radius, ellipticity=(0.0, 0.0)):
        self.half_light_radius = as_parameter(half_light_radius, ())
        self.ellipticity = as_parameter(ellipticity, (2,))

    @property
    def index(self):  # noqa: D102
        return 1.0


class DeVaucouleursMorphology(AbstractSersicMorphology):
    """A de Vaucouleurs bulge: a Sersic profile of index 4. Parameters as in `SersicMorphology`."""

    half_light_radius: np.ndarray | Array | AbstractLink
    ellipticity: np.ndarray | Array | AbstractLink
    constraints: ClassVar = {"half_light_radius": constraints.positive, "ellipticity": unit_disk}

    def __init__(self, half_light_radius, ellipticity=(0.0, 0.0)):
        self.half_light_radius = as_parameter(half_light_radius, ())
        self.ellipticity = as_parameter(ellipticity, (2,))

    @property
    def index(self):  # noqa: D102
        return 4.0


class MultiGaussianMorphology(AbstractRingMorphology):
    """Gaussian rings of fixed widths with free, non-negative amplitudes: a smooth profile of any form.

    Parameters
    ----------
    sigmas : array, shape (ring,)
        Geometric mean semi-axes in model pixels, increasing; not fitted. See `log_spaced`, `asinh_spaced`.
    amplitudes : array, shape (ring,), or link
        Relative flux of each ring, scaled to unit sum. `link.PerBand` gives each ring its own spectrum.
    ellipticity : array, shape (2,), or link
        Common to all rings; as in `SersicMorphology`.

    Raises
    ------
    ValueError
        If widths aren't positive and increasing.

    References
    ----------
    Cappellari 2002, MNRAS 333, 400, doi:10.1046/j.1365-8711.2002.05412.x; Miller & van Dokkum 2021, ApJ 923, 124,
    doi:10.3847/1538-4357/ac2b30.
    """

    sigmas: np.ndarray | Array
    amplitudes: np.ndarray | Array | AbstractLink
    ellipticity: np.ndarray | Array | AbstractLink
    constraints: ClassVar = {"amplitudes": constraints.nonnegative, "ellipticity": unit_disk}

    def __init__(self, sigmas, amplitudes=None, ellipticity=(0.0, 0.0)):
        self.sigmas = np.asarray(units.to_pixels(sigmas, "The widths of a MultiGaussianMorphology"), dtype=float)
        rising = self.sigmas.ndim == 1 and len(self.sigmas) > 0 and (np.diff(self.sigmas, prepend=0.0) > 0).all()
        if not rising or not np.isfinite(self.sigmas).all():
            raise ValueError(
                f"MultiGaussianMorphology wants finite, positive, increasing widths, shape (ring,); got {sigmas}."
            )
        count = len(self.sigmas)
        self.amplitudes = as_parameter(np.full(count, 1 / count) if amplitudes is None else amplitudes, (count,))
        self.ellipticity = as_parameter(ellipticity, (2,))

    @classmethod
    def log_spaced(cls, smallest: float, largest: float, count: int, ellipticity=(0.0, 0.0)) -> MultiGaussianMorphology:
        """Build rings of equal amplitude whose widths (pixels) have equal ratios."""
        return cls(np.geomspace(smallest, largest, count), None, ellipticity)

    @classmethod
    def asinh_spaced(
        cls, smallest: float, largest: float, count: int, scale: float = 1.0, ellipticity=(0.0, 0.0)
    ) -> MultiGaussianMorphology:
        """Build rings of equal amplitude with widths equally spaced in asinh(sigma / scale): linear below `scale` pixels."""
        ends = np.arcsinh(np.array([smallest, largest]) / scale)
        return cls(scale * np.sinh(np.linspace(ends[0], ends[1], count)), None, ellipticity)

    def rings(self, count):  # noqa: D102
        amplitudes = jnp.asarray(self.amplitudes)
        total = jnp.sum(amplitudes)
        return jnp.asarray(self.sigmas), amplitudes / jnp.where(total > 0, total, 1.0)

    @property
    def shape(self):  # noqa: D102
        return self.ellipticity

    def radius(self, psf_sigma: float, tolerance: float | None = None) -> float:  # noqa: D102
        widest = float(np.asarray(self.sigmas)[-1]) * HALF_LIGHT_PER_SIGMA
        return _stamp_radius(widest, 0.5, self.ellipticity, psf_sigma, tolerance)


class AbstractImageMorphology(AbstractMorphology):
    """A free image: non-negative values, each with its place on a stamp, that it is linear in.

    Image and values have unit sum. It follows its source by whole pixels. Constructed from (values, anchor, envelope).
    """

    envelope: eqx.AbstractVar[np.ndarray | None]
    anchor: eqx.AbstractVar[tuple[int, int]]

    @property
    @abstractmethod
    def values(self) -> np.ndarray | Array:
        """The parameter: an array of shape (..., h, w) that fits move as one block."""

    @abstractmethod
    def padded(self, shape: tuple[int, int], offset: tuple[int, int]) -> AbstractImageMorphology:
        """Return the same image at rows and columns `offset` onwards of a larger stamp of zeros, without envelope."""

    @abstractmethod
    def prior(self) -> dist.Normal | None:
        """Return the default prior of the values."""

    @abstractmethod
    def curvature(self, pixels: Float[Array, "h w"]) -> Float[Array, "*plane h w"]:
        """Return a diagonal that bounds the curvature of a function of the values, from one that does so for the pixels."""

    def with_values(self, values) -> AbstractImageMorphology:
        """Return the morphology with other values, scaled to unit sum."""
        return type(self)(values, self.anchor, self.envelope)  # pyright: ignore[reportCallIssue]

    def grown(self, shape: tuple[int, int], offset: tuple[int, int]) -> AbstractImageMorphology:
        """Return an image that may have light on all of a larger stamp, with the same values and an envelope that goes on."""
        anchor = (self.anchor[0] + offset[0], self.anchor[1] + offset[1])
        envelope = None if self.envelope is None else placed(self.envelope, shape, offset, is_ramp=True)
        return type(self)(placed(self.values, shape, offset), anchor, envelope)  # pyright: ignore[reportCallIssue]

    def radius(self, psf_sigma: float, tolerance: float | None = None) -> float:  # noqa: D102
        return max(self.values.shape[-2:]) / 2


class PixelMorphology(AbstractImageMorphology):
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
        if isinstance(image, AbstractLink):
            raise TypeError("The image of a PixelMorphology can't be a link: use one source for each band.")
        image = np.asarray(image, dtype=float)
        if image.ndim != 2 or not np.isfinite(image).all() or not image.sum() > 0:
            raise ValueError(
                f"PixelMorphology wants a finite image (y, x) with a positive sum; got shape {image.shape}"
                + (f", sum {image.sum():.3g}." if image.ndim == 2 else ".")
            )
        self.image = image / image.sum()
        self.envelope = None if envelope is None else as_envelope(envelope, image.shape)
        self.anchor = (image.shape[0] // 2, image.shape[1] // 2) if anchor is None else (int(anchor[0]), int(anchor[1]))

    @property
    def values(self):  # noqa: D102
        return self.image

    def evaluate(self, y, x, psf_sigma):  # noqa: D102
        return jnp.asarray(self.image)

    def padded(self, shape, offset):  # noqa: D102
        blank = PixelMorphology(np.ones(shape), anchor=(0, 0))
        return eqx.tree_at(lambda m: m.image, blank, placed(self.image, shape, offset))

    def prior(self):  # noqa: D102
        if self.envelope is None:
            return None
        floor = ENVELOPE_FLOOR * self.envelope.max()
        return dist.Normal(self.envelope, ENVELOPE_SCATTER * np.maximum(self.envelope, floor))

    def curvature(self, pixels):  # noqa: D102
        return pixels


def as_envelope(envelope, shape: tuple[int, ...]) -> np.ndarray:
    """Return an envelope of unit sum; ValueError if it has another shape, or holds no light."""
    envelope = np.asarray(envelope, dtype=float)
    if envelope.shape != shape or not np.isfinite(envelope).all() or envelope.min() < 0 or not envelope.sum() > 0:
        raise ValueError(
            f"An envelope is finite, non-negative and not zero, with the shape {shape} of the image; got {envelope.shape}."
        )
    return envelope / envelope.sum()


def placed(values, shape: tuple[int, int], offset: tuple[int, int], *, is_ramp: bool = False) -> np.ndarray:
    """Return images (..., y, x) at rows and columns `offset` onwards of larger ones, of zeros or falling to zero at the edges."""
    values = np.asarray(values, dtype=float)
    margins = [(o, n - o - k) for o, n, k in zip(offset, shape, values.shape[-2:], strict=True)]
    return np.pad(values, [(0, 0)] * (values.ndim - 2) + margins, mode="linear_ramp" if is_ramp else "constant")


CORE_FLUX_TOLERANCE = 1e-5
"""Fraction of the flux of a Gaussian that may fall outside its stamp."""


def _stamp_radius(half_light_radius, index, ellipticity, psf_sigma, tolerance: float | None = None) -> float:
    """Return the half-size of a stamp for a Sersic profile through the model PSF."""
    norm = min(float(np.hypot(*np.asarray(ellipticity, dtype=float))), 0.999)
    major = float(half_light_radius) * ((1 + norm) / (1 - norm)) ** 0.25
    n = float(np.clip(index, *profiles.SERSIC_RANGE))
    extent = (scipy.special.gammaincinv(2 * n, 1 - (tolerance or STAMP_FLUX_TOLERANCE)) / profiles.sersic_b(n)) ** n
    core = np.hypot(min(major, profiles.COMPACT_RINGS[1]), psf_sigma)
    ringing = profiles.ringing_radius(core) + profiles.RINGING_FADE
    return float(max(np.hypot(major * extent, psf_sigma * profiles.CORE_EXTENT), ringing))


def as_parameter(value, shape):
    """Return a parameter as an array of the given shape, or a link whose values have it."""
    if isinstance(value, AbstractLink):
        if value.values.shape[1:] != shape:
            raise ValueError(f"Expected a link of values of shape (k, *{shape}); got {value.values.shape}.")
        return value
    value = (
        value if isinstance(value, Array) else np.array(units.to_pixels(value, "A parameter of a morphology"), float)
    )
    if value.shape != shape:
        raise ValueError(f"Expected a parameter of shape {shape}; got {value.shape}.")
    return value
