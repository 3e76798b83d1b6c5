"""Light on and inside ellipses: of profiles whose own ellipses may be others, elsewhere, and seen through a PSF.

A radius here is the circularised one of an ellipse, the geometric mean of its semi-axes, in pixels. All arrays start with the
axes draw and plane (a plane is a channel, or stands for all).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.interpolate
import scipy.special
from jax import lax
from jaxtyping import Array, Float

from scenefit.arrays import profiles
from scenefit.arrays.compilation import as_floats, compiled

QUARTER_NODES, CIRCLE_NODES, MAX_FINER = 16, 64, 8
"""Angles in a quarter turn at which ellipses of one centre are compared, and in a full one if the centres differ, times at most
the third if that is by more than a part's size. Axis ratios that differ by a factor 2 leave errors below 1e-9 of the light; the
angles of a full turn leave up to 1e-3 of a part's light, where an ellipse passes through the part's centre."""
WHOLE_PROFILE = (1e-2, 1e2)
"""Half-light radii between which a Sersic profile is tabulated. For n = 4 there is 4e-3 of the light within and 4e-5 beyond, for
n = 8 2e-2 and 6e-3."""
NARROWEST_RING, WIDEST_RING = 0.1, 30.0
"""Width of the narrowest Gaussian that a PSF blurs, in units of the PSF's: what is narrower counts with its second moment; and
that of the widest one, in units of the largest radius."""
LARGEST_RATIO = float(np.exp(6.5))
"""Widths of Gaussians, in half-light radii, beyond which Sersic profiles have at most 1e-4 of their light."""
TABLE_STEP = 0.15
"""Step in the logarithm of the radius of tables, which are interpolated with cubics: curves of growth to 2e-5 of the flux for
n = 0.5, 4e-6 for n >= 1; surface brightnesses to 6e-4 and 2e-5."""
BISECTIONS = 20
"""Halvings of that step before a radius counts as found."""
MAX_NODES = 1024
"""With so many angles a part is found as far from the centre as a hundred widths of the PSF."""
_FAINTEST = float(np.finfo(float).tiny)
_BATCH = 20
_CHUNK = 4_000_000


class AbstractLight(eqx.Module):
    """A round profile of unit flux; what it is convolved with or how it is flattened, others say."""

    @abstractmethod
    def density(self, radius: np.ndarray) -> np.ndarray:
        """Return the flux per pixel squared at radii, shape (draw, plane, ...)."""

    @abstractmethod
    def growth(self, radius: np.ndarray) -> np.ndarray:
        """Return the flux inside radii, shape (draw, plane, ...); without a point at its centre for radius 0."""

    @abstractmethod
    def extent(self) -> tuple[float, ...]:
        """Return radii that have all structure, and nearly all light, between them; none for a point."""

    @abstractmethod
    def rings(self, narrowest: float, widest: float) -> tuple[np.ndarray, np.ndarray]:
        """Return widths and fluxes of Gaussians, shape (draw, plane, ring), narrower and wider ones than wanted included."""


class SersicLight(AbstractLight):
    """Sersic profiles, exactly (Graham & Driver 2005, PASA 22, 118, equations 2 to 6, doi:10.1071/AS05001).

    Attributes
    ----------
    index, half_light_radius : arrays, shape (draw, plane)
    """

    index: np.ndarray
    half_light_radius: np.ndarray

    def density(self, radius):  # noqa: D102
        n, size = (_append_axes(each, radius) for each in (self.index, self.half_light_radius))
        b = profiles.sersic_b(n)
        peak = b ** (2 * n) / (2 * np.pi * n * size**2 * scipy.special.gamma(2 * n))
        return peak * np.exp(-b * (radius / size) ** (1 / n))

    def growth(self, radius):  # noqa: D102
        n, size = (_append_axes(each, radius) for each in (self.index, self.half_light_radius))
        return scipy.special.gammainc(2 * n, profiles.sersic_b(n) * (radius / size) ** (1 / n))

    def extent(self):  # noqa: D102
        sizes = self.half_light_radius
        return WHOLE_PROFILE[0] * float(sizes.min()), WHOLE_PROFILE[1] * float(sizes.max())

    def rings(self, narrowest, widest):  # noqa: D102
        scale = profiles.SMALLEST_RING / narrowest
        widest = min(widest, LARGEST_RATIO * float(self.half_light_radius.max()))
        count = profiles.num_rings(int(np.ceil(widest * scale)))
        flat = as_floats(self.index.ravel()), as_floats(scale * self.half_light_radius.ravel())
        weights = np.asarray(_sersic_rings(*flat, count), dtype=float).reshape(*self.index.shape, -1)
        return np.broadcast_to(profiles.ring_sigmas(count) / scale, weights.shape), weights


@compiled
def _sersic_rings(index, half_light_radius, count):
    return jax.vmap(lambda n, r: profiles.sersic_weights(n, r, count))(index, half_light_radius)


class RingLight(AbstractLight):
    """Sums of Gaussians, and of points, which have no width and no surface brightness.

    Attributes
    ----------
    sigmas, weights : arrays, shape (draw, plane, ring)
    """

    sigmas: np.ndarray
    weights: np.ndarray

    def density(self, radius):  # noqa: D102
        total = np.zeros(np.broadcast_shapes(radius.shape, _append_axes(self.sigmas[..., 0], radius).shape))
        for sigma, weight in self._each(radius):
            width = np.where(sigma > 0, sigma, 1.0)
            gaussian = np.exp(-0.5 * (radius / width) ** 2) / (2 * np.pi * width**2)
            total += np.where(sigma > 0, weight * gaussian, 0.0)
        return total

    def growth(self, radius):  # noqa: D102
        total = np.zeros(np.broadcast_shapes(radius.shape, _append_axes(self.sigmas[..., 0], radius).shape))
        for sigma, weight in self._each(radius):
            inside = -np.expm1(-0.5 * (radius / np.where(sigma > 0, sigma, 1.0)) ** 2)
            total += weight * np.where(sigma > 0, inside, radius > 0)
        return total

    def extent(self):  # noqa: D102
        wide = self.sigmas[self.sigmas > 0]
        return (0.05 * float(wide.min()), 10 * float(wide.max())) if wide.size else ()

    def rings(self, narrowest, widest):  # noqa: D102
        return self.sigmas, self.weights

    def _each(self, radius):
        """Yield width and flux of one Gaussian after the other."""
        for n in range(self.sigmas.shape[-1]):
            yield tuple(_append_axes(each[..., n], radius) for each in (self.sigmas, self.weights))


def shape_matrix(ellipticity: Float[np.ndarray, "*axes 2"]) -> Float[np.ndarray, "*axes 2 2"]:
    """Return the matrix E of unit determinant, order (y, x), of the ellipses `x^T E^-1 x = R^2`."""
    e1, e2 = ellipticity[..., 0], ellipticity[..., 1]
    rows = [np.stack([1 - e1, e2], axis=-1), np.stack([e2, 1 + e1], axis=-1)]
    return np.stack(rows, axis=-2) / np.sqrt(1 - e1**2 - e2**2)[..., None, None]


def axis_ratio(ellipticity: Float[np.ndarray, "*axes 2"]) -> Float[np.ndarray, "*axes"]:
    """Return the ratio q of the minor to the major axis."""
    norm = np.hypot(ellipticity[..., 0], ellipticity[..., 1])
    return np.sqrt((1 - norm) / (1 + norm))


def intrinsic_light(
    light: AbstractLight,
    radius: Float[np.ndarray, " radius"],
    ellipticity: Float[np.ndarray, "draw plane 2"],
    own_ellipticity: Float[np.ndarray, "draw plane 2"],
    offset: Float[np.ndarray, "draw 2"],
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean surface brightness on, and flux inside, ellipses of given radii.

    Exact for a part on its own ellipses. Else both are averages over angles: of the surface brightness along the ellipse, and
    of the part's curve of growth at its distances from the part's centre.

    Parameters
    ----------
    light : AbstractLight
        The part, round.
    radius : array, shape (radius,)
    ellipticity, own_ellipticity : arrays, shape (draw, plane, 2)
        Of the ellipses, and of the part.
    offset : array, shape (draw, 2)
        Centre (y, x) of the part minus that of the ellipses, pixels.

    Returns
    -------
    arrays, shape (draw, plane, radius)
        Flux per pixel squared, and flux, of a part of unit flux.
    """
    is_centered = not offset.any()
    is_same = is_centered and bool(np.allclose(ellipticity, own_ellipticity, rtol=0, atol=1e-9))
    nodes = 1 if is_same else QUARTER_NODES if is_centered else CIRCLE_NODES * _finer(light, offset)
    angle = (0.5 * np.pi if is_centered else 2 * np.pi) * (np.arange(nodes) + 0.5) / nodes
    direction = np.sin(angle), np.cos(angle)
    rows = max(1, _CHUNK // (nodes * len(radius) * ellipticity.shape[1]))
    parts = []
    for start in range(0, len(offset), rows):
        part = slice(start, start + rows)
        here = jax.tree.map(lambda each, part=part: each[part], light)
        if is_same:
            at = np.broadcast_to(radius, (*ellipticity[part].shape[:2], len(radius)))
            parts.append((here.density(at), here.growth(at)))
            continue
        inverse = np.linalg.inv(_root(shape_matrix(ellipticity[part])))
        turn = inverse @ _root(shape_matrix(own_ellipticity[part]))
        if is_centered:
            # Without rotations all quarters look alike.
            turn = np.linalg.svd(turn, compute_uv=False)[..., None] * np.eye(2)
        shift = np.einsum("dpij,dj->dpi", inverse, offset[part])
        parts.append((_density(here, radius, turn, shift, direction), _growth(here, radius, turn, shift, direction)))
    density, growth = (np.concatenate(each) for each in zip(*parts, strict=True))
    return density, growth


def _finer(light, offset) -> int:
    """Return how many times more angles a part wants that is farther from the centre than it is large."""
    extent = light.extent()
    size = np.sqrt(extent[0] * extent[1]) if extent else np.inf
    return int(np.clip(np.ceil(np.abs(offset).max() / size), 1, MAX_FINER))


def _density(light, radius, turn, shift, direction):
    """Average the surface brightness along `|shift + turn x| = R`, x being positions in which the part is round."""
    place = [radius[:, None] * direction[i] - shift[:, :, None, None, i] for i in (0, 1)]
    own = _times(np.linalg.inv(turn)[:, :, None, None], place)
    return light.density(np.hypot(*own)).mean(axis=-1)


def _growth(light, radius, turn, shift, direction):
    """Average the part's light between the places where a ray from its centre enters and leaves `|shift + turn x| < R`."""
    ray = _times(turn[:, :, None], direction)
    a = ray[0] ** 2 + ray[1] ** 2
    middle = -(ray[0] * shift[:, :, None, 0] + ray[1] * shift[:, :, None, 1]) / a
    beyond = radius[:, None] ** 2 - np.sum(shift**2, axis=-1)[:, :, None, None]
    square = (middle**2)[:, :, None] + beyond / a[:, :, None]
    half, middle = np.sqrt(np.maximum(square, 0.0)), middle[:, :, None]
    leaves = np.where(square > 0, np.maximum(middle + half, 0.0), 0.0)
    inside = light.growth(leaves)
    # Only ellipses that leave the part's centre out are entered.
    outer = (beyond < 0).any(axis=(0, 1, 3))
    enters = np.where(square[:, :, outer] > 0, np.maximum(middle - half[:, :, outer], 0.0), 0.0)
    inside[:, :, outer] -= light.growth(enters)
    return inside.mean(axis=-1)


def _times(matrix, vector):
    """Return the two components of matrices times vectors, the latter given by components."""
    return [matrix[..., i, 0] * vector[0] + matrix[..., i, 1] * vector[1] for i in (0, 1)]


def convolved_light(
    light: AbstractLight,
    radius: Float[np.ndarray, "draw plane radius"],
    ellipticity: Float[np.ndarray, "draw plane 2"],
    own_ellipticity: Float[np.ndarray, "draw plane 2"],
    offset: Float[np.ndarray, "draw 2"],
    psf_sigma: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean surface brightness on, and flux inside, ellipses after a convolution with a round Gaussian.

    As in `intrinsic_light`, but of the Gaussians by which a model is rendered, and with radii for every draw and plane. Each
    Gaussian is integrated along rays from the ellipse's centre in closed form.

    Parameters
    ----------
    psf_sigma : float
        Standard deviation of the round Gaussian, pixels.
    """
    sigmas, weights = light.rings(NARROWEST_RING * psf_sigma, WIDEST_RING * float(radius.max()))
    inverse = np.linalg.inv(_root(shape_matrix(ellipticity)))
    of_part = inverse @ shape_matrix(own_ellipticity) @ inverse
    of_psf = inverse @ inverse
    moments = sigmas[..., None, None] ** 2 * of_part[:, :, None] + psf_sigma**2 * of_psf[:, :, None]
    variances, axes = np.linalg.eigh(moments)
    shift = np.einsum("dpgji,dpj->dpgi", axes, np.einsum("dpij,dj->dpi", inverse, offset))
    is_centered = not offset.any()
    # Sums over evenly spaced angles are exact once a step is narrower than what is summed: than the arc of an oval that the
    # narrowest Gaussian is, or than its width as seen from the centre.
    narrowest = np.sqrt(variances[..., 0].min())
    flattening = np.sqrt(np.max(variances[..., 1] / variances[..., 0]))
    wanted = 6 * flattening if is_centered else max(24 * flattening, 8 * np.abs(shift).max() / narrowest)
    nodes = int(min(MAX_NODES, 2 ** np.ceil(np.log2(max(wanted, 8)))))
    angle = (0.5 * np.pi if is_centered else 2 * np.pi) * (np.arange(nodes) + 0.5) / nodes
    count = radius.shape[0] * radius.shape[1]
    radius_rows, *rows = (
        as_floats(np.reshape(each, (count, *each.shape[2:]))) for each in (radius, variances, shift, weights)
    )
    density, growth = _gaussians(radius_rows, rows[0], rows[1], rows[2], as_floats(angle))
    return np.asarray(density, float).reshape(radius.shape), np.asarray(growth, float).reshape(radius.shape)


# Not `compiled`: its options double the run time, which counts more here.
@eqx.filter_jit
def _gaussians(
    radius: Float[Array, "row radius"],
    variances: Float[Array, "row ring 2"],
    shift: Float[Array, "row ring 2"],
    weights: Float[Array, "row ring"],
    angle: Float[Array, " node"],
) -> tuple[Float[Array, "row radius"], Float[Array, "row radius"]]:
    """Return means on, and sums inside, circles of Gaussians along the axes, at a shift from the circles' centre."""

    def row(values):
        radius, variances, shift, weights = values
        determinant = variances[:, 0] * variances[:, 1]

        def at_angle(totals, angle):
            direction = jnp.stack([jnp.cos(angle), jnp.sin(angle)])
            # Along the ray the exponent is a (r - nearest)^2 / 2 + beside.
            a = jnp.sum(direction**2 / variances, axis=-1)[:, None]
            nearest = jnp.sum(direction * shift / variances, axis=-1)[:, None] / a
            across = (direction[0] * shift[:, 1] - direction[1] * shift[:, 0])[:, None]
            beside = 0.5 * across**2 / (determinant[:, None] * a)
            scale = jnp.sqrt(0.5 * a)
            start, end = -scale * nearest, scale * (radius - nearest)
            gaussian, first = (jnp.exp(-(at**2) - beside) for at in (end, start))
            slope = nearest * jnp.sqrt(0.5 * jnp.pi / a) * jnp.exp(-beside)
            inside = (first - gaussian) / a + slope * (lax.erf(end) - lax.erf(start))
            peak = weights / jnp.sqrt(determinant)
            return (totals[0] + peak @ gaussian / (2 * jnp.pi), totals[1] + peak @ inside), None

        zero = jnp.zeros_like(radius)
        totals, _ = lax.scan(at_angle, (zero, zero), angle)
        return tuple(total / len(angle) for total in totals)

    return lax.map(row, (radius, variances, shift, weights), batch_size=_BATCH)


class GrowthTable(eqx.Module):
    """Light of a part of unit flux on and inside ellipses, by their radius.

    Attributes
    ----------
    log_radius : array, shape (radius,)
        At steps of `TABLE_STEP`.
    log_density, steepness : arrays, shape (draw, plane, radius)
        Logarithm of the mean surface brightness on ellipses, and its derivative.
    growth : array, shape (draw, plane, radius)
        Flux inside ellipses.
    """

    log_radius: np.ndarray
    log_density: np.ndarray
    steepness: np.ndarray
    growth: np.ndarray

    @classmethod
    def build(cls, light, log_radius, ellipticity, own_ellipticity, offset) -> GrowthTable:
        """Tabulate what `intrinsic_light` returns."""
        density, growth = intrinsic_light(light, np.exp(log_radius), ellipticity, own_ellipticity, offset)
        log_density = np.log(np.maximum(density, _FAINTEST))
        steepness = scipy.interpolate.CubicSpline(log_radius, log_density, axis=-1)(log_radius, 1)
        return cls(log_radius, log_density, steepness, growth)

    @property
    def density(self) -> np.ndarray:
        """Mean surface brightness on ellipses, shape (draw, plane, radius)."""
        return np.exp(self.log_density)

    def at(self, log_radius: Float[np.ndarray, "draw channel n"]) -> tuple[np.ndarray, np.ndarray]:
        """Return surface brightness and growth at other radii, shape (draw, channel, n)."""
        position = np.clip((log_radius - self.log_radius[0]) / TABLE_STEP, 0.0, len(self.log_radius) - 1.0)
        below = np.minimum(position.astype(int), len(self.log_radius) - 2)

        def ends(values):
            values = np.broadcast_to(values, (*log_radius.shape[:2], values.shape[-1]))
            return np.take_along_axis(values, below, axis=-1), np.take_along_axis(values, below + 1, axis=-1)

        t, logarithm, growth = position - below, ends(self.log_density), ends(self.growth)
        radii = (np.exp(2 * self.log_radius[below + n]) for n in (0, 1))
        slope = [2 * np.pi * square * np.exp(value) for square, value in zip(radii, logarithm, strict=True)]
        density = np.exp(_cubic(t, *logarithm, *ends(self.steepness)))
        return np.where(density > 2 * _FAINTEST, density, 0.0), _cubic(t, *growth, *slope)


def outermost_fall(
    log_radius: np.ndarray, values: np.ndarray, function: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return the largest radius at which a function becomes negative.

    Parameters
    ----------
    log_radius : array, shape (radius,)
    values : array, shape (draw, channel, radius)
        The function there.
    function : callable
        It takes logarithms of radii, shape (draw, channel, 1).

    Returns
    -------
    array, shape (draw, channel)
        NaN where it never does.
    """
    falls = (values[..., :-1] >= 0) & (values[..., 1:] < 0)
    last = falls.shape[-1] - 1 - np.argmax(falls[..., ::-1], axis=-1)
    low, high = log_radius[last][..., None], log_radius[last + 1][..., None]
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        above = function(middle) >= 0
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(falls.any(axis=-1), np.exp(0.5 * (low + high))[..., 0], np.nan)


def _cubic(t, value, next_value, slope, next_slope):
    """Interpolate between two nodes of a table, 0 <= t <= 1."""
    slope, next_slope = TABLE_STEP * slope, TABLE_STEP * next_slope
    change = next_value - value
    return value + t * (slope + t * (3 * change - 2 * slope - next_slope + t * (slope + next_slope - 2 * change)))


def _root(matrix):
    """Return the symmetric root of symmetric matrices of unit determinant."""
    trace = matrix[..., 0, 0] + matrix[..., 1, 1]
    return (matrix + np.eye(2)) / np.sqrt(trace + 2)[..., None, None]


def _append_axes(values, like):
    """Return values, shape (draw, plane), with as many axes as `like`."""
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))
