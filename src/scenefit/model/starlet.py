"""Free images of starlets: B-splines of several widths, as smooth as the data let them be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from jaxtyping import Array, Float
from numpyro.distributions import constraints

from scenefit.arrays import starlet
from scenefit.model.link import AbstractLink
from scenefit.model.morphology import AbstractImageMorphology, as_envelope, placed
from scenefit.model.parameters import ENVELOPE_FLOOR

NUM_SCALES = 5
"""Widths of B-splines if no other number is asked for: standard deviations of 0, 1, 2.2, 4.6 and 9.2 pixels."""
SCATTER, FINENESS = 3.0, 0.85
"""Standard deviation of the coefficients of the widest B-splines around those of the envelope, as a fraction of the envelope, and
the ratio of each narrower plane's to that of the next wider one: errors of images and of neighbours' fluxes, on fields as in
`benchmarks/free_images.py`, were then smallest."""
BARE_SCATTER = 150.0
"""Without envelope, the standard deviation about zero of the coefficients of the widest B-splines, times the number of all: wide,
since a galaxy fills a small part of its stamp."""
STEPS, RELAXATION = 50, 1.8
"""Multiplicative steps towards an image, and the power that they are taken to: above 1 they are longer; 2 wouldn't converge."""


class StarletMorphology(AbstractImageMorphology):
    """A free image as a non-negative sum of B-splines of several widths, through the model PSF; scaled to unit sum.

    `m = sum_j B_j c_j` with a B-spline of unit sum at every pixel for each scale j: a single pixel for j = 0, the others with
    a variance of (4^j - 1) / 3 pixels squared along each axis (starlets of the second generation, see
    `scenefit.arrays.starlet`). Non-negative coefficients make a non-negative image with their sum. Light where the data
    determine no detail comes from wide B-splines and is smooth, while knots and arms can be as sharp as in free pixels. What of a
    B-spline lies beyond the edges of the stamp is folded back.

    Parameters
    ----------
    coefficients : array, shape (scale, h, w)
        Flux in each B-spline, narrowest first; scaled to unit sum. `from_image` finds those of an image.
    anchor : (int, int), optional
        Pixel (y, x) of the image that lies on the model pixel nearest to the source's centre; its middle by default.
    envelope : array, shape (scale, h, w), optional
        Coefficients of a smooth guess of the image, scaled to unit sum. `Parameters.default` gives every coefficient a
        normal prior around that of the envelope, of a width proportional to the guess at its place: most for the widest B-splines
        (`SCATTER`), by `FINENESS` less for each narrower scale. Without envelope it is about zero and the same everywhere.

    Raises
    ------
    ValueError
        If the coefficients aren't three-dimensional, not finite or sum to nothing.

    References
    ----------
    Starck, Murtagh & Bertero 2011, Handbook of Mathematical Methods in Imaging, 1489, doi:10.1007/978-0-387-92920-0_34.
    """

    coefficients: np.ndarray | Array
    envelope: np.ndarray | None
    anchor: tuple[int, int] = eqx.field(static=True)
    splines: tuple[np.ndarray | Array, np.ndarray | Array]
    """B-splines along y, shape (scale - 1, h, h), and x, those of single pixels left out; they follow from the shape."""
    constraints: ClassVar = {"coefficients": constraints.nonnegative}

    def __init__(self, coefficients, anchor: tuple[int, int] | None = None, envelope=None):
        if isinstance(coefficients, AbstractLink):
            raise TypeError("The coefficients of a StarletMorphology can't be a link: use one source for each band.")
        coefficients = np.asarray(coefficients, dtype=float)
        if coefficients.ndim != 3 or not np.isfinite(coefficients).all() or not coefficients.sum() > 0:
            raise ValueError(
                "StarletMorphology wants finite coefficients (scale, y, x) with a positive sum, or use "
                f"StarletMorphology.from_image; got shape {coefficients.shape}"
                + (f", sum {coefficients.sum():.3g}." if coefficients.ndim == 3 else ".")
            )
        num_scales, *shape = coefficients.shape
        self.coefficients = coefficients / coefficients.sum()
        self.envelope = None if envelope is None else as_envelope(envelope, coefficients.shape)
        self.anchor = (shape[0] // 2, shape[1] // 2) if anchor is None else (int(anchor[0]), int(anchor[1]))
        self.splines = _splines(shape, num_scales)

    @classmethod
    def from_image(
        cls, image, num_scales: int = NUM_SCALES, *, anchor: tuple[int, int] | None = None, envelope=None
    ) -> StarletMorphology:
        """Build from an image.

        Coefficients start in proportion to the area of the B-splines and take multiplicative steps towards the image; what
        is then missing goes into single pixels. The image that they make of a galaxy seen through a PSF is within two
        hundredths of its peak everywhere; that of pixels of pure noise only within a fifth.

        Parameters
        ----------
        image : array, shape (h, w)
            Negative pixels count as zero.
        num_scales : int
            Planes of coefficients, at least 1.
        anchor : (int, int), optional
            As in the constructor.
        envelope : array, shape (h, w), optional
            Smooth guess of the image, as an image.

        Raises
        ------
        ValueError
            If image or envelope isn't a finite image with a positive sum, or their shapes differ.
        """
        image = _as_image(image)
        coefficients = _coefficients_of(image, num_scales)
        if envelope is None:
            return cls(coefficients, anchor)
        envelope = _as_image(envelope)
        same = envelope.shape == image.shape and np.array_equal(envelope, image)
        return cls(coefficients, anchor, coefficients if same else _coefficients_of(envelope, num_scales))

    @property
    def image(self) -> np.ndarray:
        """The image, shape (h, w)."""
        return np.asarray(_sum_of_splines(self.coefficients, self.splines), dtype=float)

    @property
    def values(self):  # noqa: D102
        return self.coefficients

    def evaluate(self, y, x, psf_sigma):  # noqa: D102
        return _sum_of_splines(self.coefficients, self.splines)

    def padded(self, shape, offset):  # noqa: D102
        blank = StarletMorphology(np.ones((len(self.coefficients), *shape)), anchor=(0, 0))
        # B-splines of the true stamp: they end at its edges.
        axes = zip(self.splines, shape, offset, strict=True)
        splines = tuple(placed(matrices, (size, size), (start, start)) for matrices, size, start in axes)
        values = placed(self.coefficients, shape, offset)
        return eqx.tree_at(lambda m: (m.coefficients, m.splines), blank, (values, splines))

    def prior(self):  # noqa: D102
        scatter = (FINENESS ** np.arange(len(self.coefficients))[::-1])[:, None, None]
        if self.envelope is None:
            return dist.Normal(np.zeros_like(scatter), BARE_SCATTER / self.coefficients.size * scatter)
        guess = np.asarray(_sum_of_splines(self.envelope, self.splines), dtype=float)
        return dist.Normal(self.envelope, SCATTER * scatter * np.maximum(guess, ENVELOPE_FLOOR * guess.max()))

    def curvature(self, pixels):  # noqa: D102
        # With diagonal H and B-splines of unit sum, whose matrices are symmetric, |sum_j B_j c_j|^2_H is at most
        # sum_j (B_j H 1) c_j^2 times the number of scales: the sums of the rows of the matrix.
        rows, columns = self.splines
        spread = jnp.einsum("sik,kl,sjl->sij", rows, pixels, columns)
        return len(self.coefficients) * jnp.concatenate([pixels[None], spread])


def _splines(shape: Sequence[int], num_scales: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the B-splines along both axes of an image, those of single pixels left out."""
    height, width = (starlet.spline_matrices(size, num_scales)[1:] for size in shape)
    return height, width


def _sum_of_splines(coefficients, splines) -> Float[Array, "h w"]:
    """Return the image: `starlet.inverse` of the second generation.

    As products of matrices, since compiled loops over shifted images take several times as long on CPUs.
    """
    rows, columns = splines
    wide = jnp.einsum("skl,sjl->skj", coefficients[1:], columns, precision=lax.Precision.HIGHEST)
    return coefficients[0] + jnp.einsum("sik,skj->ij", rows, wide, precision=lax.Precision.HIGHEST)


def _coefficients_of(image: np.ndarray, num_scales: int) -> np.ndarray:
    """Return non-negative coefficients whose image is near a non-negative one.

    (Multiplicative steps to non-negative least squares: Daube-Witherspoon & Muehllehner 1986, IEEE Trans. Med. Imaging 5, 61,
    doi:10.1109/TMI.1986.4307748.)
    """
    rows, columns = _splines(image.shape, num_scales)

    def transposed(pixels):
        return np.concatenate([pixels[None], rows @ pixels @ columns])

    def total(coefficients):
        return coefficients[0] + np.sum(rows @ coefficients[1:] @ columns, axis=0)

    target = transposed(image)
    coefficients = target * (4.0 ** np.arange(num_scales))[:, None, None]
    coefficients *= image.sum() / coefficients.sum()
    for _ in range(STEPS):
        ratio = target / np.maximum(transposed(total(coefficients)), np.finfo(float).tiny)
        coefficients = coefficients * ratio**RELAXATION
    coefficients[0] += np.maximum(image - total(coefficients), 0.0)
    return coefficients


def _as_image(image) -> np.ndarray:
    """Return an image of unit sum without negative pixels."""
    image = np.asarray(image, dtype=float)
    if image.ndim != 2 or not np.isfinite(image).all() or not np.maximum(image, 0.0).sum() > 0:
        raise ValueError(
            f"StarletMorphology.from_image wants finite images (y, x) with a positive sum; got shape {image.shape}."
        )
    image = np.maximum(image, 0.0)
    return image / image.sum()
