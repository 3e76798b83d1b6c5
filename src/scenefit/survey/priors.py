"""Weakly informative priors read off the images: proper, independent of units, and wide enough for the data to decide."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import numpy as np
import numpyro.distributions as dist
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from scenefit.data.observation import Observation
from scenefit.model.morphology import HALF_LIGHT_PER_SIGMA, parameter_values
from scenefit.model.parameters import Parameter, Parameters, is_image
from scenefit.model.scene import Scene
from scenefit.sky.frame import pixel_map, pixel_scale_of

ELLIPTICITY_SCATTER = 0.5
"""Standard deviation of each component of the ellipticity: all axis ratios above 0.2 are within two."""
SCALE_WIDTH = 0.5
"""Width of the prior of a noise's scale."""
FLUX_ERRORS = 5.0
"""The prior of a flux is at least so many of its standard errors wide."""
SKY_ERRORS = 2.0
"""The prior of a background is so many errors of the measured sky wide."""
CLIP, CLIP_ROUNDS = 3.0, 5
"""Sky pixels further than so many standard deviations from the others are left out, so many times over."""
FEWEST_PIXELS = 16
"""Fewer pixels than these say nothing about the sky."""
APERTURE_RATIO = 1.25
"""Ratio of the radii of successive apertures."""
SIGNIFICANT = 2.0
"""An aperture counts whose light is above so many standard errors."""


def automatic(
    scene: Scene,
    observations: Sequence[Observation] | Observation,
    parameters: Parameters | None = None,
    *,
    scale: float = 1.0,
) -> Parameters:
    """Give every free parameter a weakly informative prior, from the scene's start and the images.

    ===================  ==========================================================================================
    flux                 normal around the start s, of width max(s, A + 5 standard errors of such a source)
    half_light_radius    normal around the start s, of width max(s, R + FWHM of the sharpest PSF)
    sersic_index         uniform over its range
    ellipticity          normal around 0, of width 0.5 for each component: isotropic, cut off by the unit disk
    center               normal around the start, of the width of a pixel of the finest observation
    amplitudes           what `Parameters.default` gives them
    image                left as it is
    astrometry.shift     normal around the start, of the width of a pixel of the observation
    astrometry.rotation  normal around the start, of the angle that moves the longer edges of the observation by a pixel
    background           normal around the level of the sky, of the width of 2 errors of that
    background_slope     normal around the slope of the sky, of the width of 2 errors of that
    noise                half-normal, of width max(noise level, scatter of the sky)
    ===================  ==========================================================================================

    Normal ones are cut off at the range of the parameter's constraint. Starts are the centres, since apertures mislead where
    sources overlap; widths come from the images, too, so that starts of the wrong size do no harm: A is the light around a
    source, added up outwards to where it is lost in the noise, 0 if it isn't significant, and R the radius of half of it, the
    PSF taken out. Every pixel counts for the source that is nearest; those within a standard deviation of the PSF share A.

    The sky is that half of a channel's valid pixels that is farthest from all sources, without outliers. Its error has three
    parts: the standard error; the difference between the farther and the nearer half of these pixels, for the wings of
    sources; and that between mean and median, for what clipping doesn't reach.

    All scales with the data and its noise, so that the unit doesn't matter. A link's values each have the prior of the
    parameter. A parameter that is tied to another is left alone; the other one's start counts. What is free stays so.

    Parameters
    ----------
    scene : Scene
        Its values are the starts.
    observations : sequence of Observation
    parameters : Parameters, optional
        What is free; `Parameters.default(scene, observations)` if not given. A parameter that has a prior keeps it; with
        `parameters.prior(path, None)` it is made anew.
    scale : float
        What all widths are multiplied with, positive.

    Returns
    -------
    changed : Parameters
        A prior has the shape of its parameter, or is one for all elements.

    Raises
    ------
    ValueError
        If `scale` isn't positive, there is no observation, the parameters aren't those of the scene and the observations,
        there is no rule for one of them, or a prior excludes its start.

    Notes
    -----
    Radii, indices, centers and backgrounds are much as those of Pasha & Miller 2023 (pysersic), JOSS 8, 5703,
    doi:10.21105/joss.05703. Their fluxes have a width of twice the root of the counts, which depends on the unit.
    """
    observations = [observations] if isinstance(observations, Observation) else list(observations)
    if not 0 < scale < np.inf:
        raise ValueError(f"scale= multiplies the widths of the priors and must be positive and finite; got {scale}.")
    if not observations:
        raise ValueError("Priors are read off the images: give at least one observation.")
    default = Parameters.default(scene, observations)
    parameters = default if parameters is None else parameters
    _check_same(parameters, default)
    wanted = [p for p in parameters if p.free and p.tied_to is None and p.prior is None and not is_image(p.path)]
    guesses = _guesses(scene, observations, parameters) if wanted else {}
    table = dict(parameters.table)
    for parameter in wanted:
        prior = default.table[parameter.path].prior
        if prior is None:
            prior = _prior(parameter, guesses.get(parameter.path), scale)
        table[parameter.path] = parameter.replace(prior=prior)
    result = Parameters(table, parameters.pixel_scale)
    check_start(scene, observations, result)
    return result


def check_start(scene: Scene, observations: Sequence[Observation] | Observation, parameters: Parameters):
    """Raise ValueError if a parameter that isn't fixed starts where its prior has no density.

    Parameters
    ----------
    scene : Scene
    observations : sequence of Observation
    parameters : Parameters
        Of that scene and these observations. A tied parameter starts where the one does that it is tied to.

    Raises
    ------
    ValueError
        Names the parameter, its start and its prior; or says that the parameters aren't those of the scene.
    """
    observations = [observations] if isinstance(observations, Observation) else list(observations)
    _check_same(parameters, Parameters.default(scene, observations))
    starts = _starts(scene, observations)
    for parameter in parameters:
        source = parameters.table[parameter.tied_to or parameter.path]
        if parameter.prior is None or not source.free:
            continue
        start = starts[source.path]
        if not _has_density(parameter.prior, start):
            raise ValueError(
                f"{parameter.path} starts at {_text(start)}, where its prior has no density: {_describe(parameter.prior)}. "
                "Change the start or the prior."
            )


def _check_same(parameters: Parameters, default: Parameters):
    """Raise ValueError unless the parameters are those of the scene and the observations."""
    given, known = ({p.path: p.shape for p in each} for each in (parameters, default))
    if wrong := sorted(path for path in given.keys() | known.keys() if given.get(path) != known.get(path)):
        raise ValueError(
            f"The parameters are those of another scene or of other observations: {len(wrong)} are missing, unknown or have "
            f"another shape, such as {wrong[0]}."
        )


def _starts(scene, observations) -> dict[str, np.ndarray]:
    """Return the values of all parameters by path."""
    values = {}
    for path, component in scene.components():
        values[f"{path}.center"] = component.center
        values[f"{path}.spectrum.flux"] = component.spectrum.flux
        for name, value in parameter_values(component.morphology).items():
            values[f"{path}.morphology.{name}"] = value
    for obs in observations:
        base = f"observations.{obs.name}"
        values |= {f"{base}.{path}": value for path, value in obs.nuisances().items()}
        for name in obs.noise.parameters:
            values[f"{base}.noise.{name}"] = getattr(obs.noise, name)
    return {path: np.asarray(value, dtype=float) for path, value in values.items()}


def _has_density(prior: dist.Distribution, value: np.ndarray) -> bool:
    """Return whether the prior has a density at a value, bounds included where it has one there."""
    low, high = getattr(prior.support, "lower_bound", -np.inf), getattr(prior.support, "upper_bound", np.inf)
    has_bounds = bool(np.isfinite(low).any() or np.isfinite(high).any())
    is_inside = (value >= low) & (value <= high) if has_bounds else prior.support(value)
    return bool(np.all(is_inside)) and bool(np.isfinite(prior.log_prob(value)).all())


def _describe(prior: dist.Distribution) -> str:
    """Return a distribution with its arguments."""
    inner = [_describe(prior.base_dist)] if isinstance(getattr(prior, "base_dist", None), dist.Distribution) else []
    given = [f"{name}={_text(vars(prior)[name])}" for name in prior.arg_constraints if name in vars(prior)]
    return f"{type(prior).__name__}({', '.join(inner + given)})"


def _text(value) -> str:
    """Return a number, or some of many, for messages."""
    return np.array2string(np.asarray(value), precision=4, threshold=6)


def _prior(parameter: Parameter, guess: tuple | None, scale: float) -> dist.Distribution:
    """Return the normal distribution of a guess within the range of a parameter; a uniform one without a guess."""
    low, high = (getattr(parameter.constraint, f"{side}_bound", None) for side in ("lower", "upper"))
    if guess is not None:
        location, width = (np.array(part, dtype=float) for part in np.broadcast_arrays(*guess))
        if not np.isfinite(location).all():
            raise ValueError(f"{parameter.path} starts at {_text(location)}; a prior wants a finite start.")
        # Bounds of the same shape: others can't be read back from a file.
        low, high = (None if bound is None else np.full(location.shape, float(bound)) for bound in (low, high))
        normal = dist.Normal(location, np.asarray(scale * width))
        return normal if low is None and high is None else dist.TruncatedDistribution(normal, low=low, high=high)
    if low is None or high is None:
        raise ValueError(
            f"There is no rule for the prior of {parameter.path} (constraint: {parameter.constraint}); give it one before: "
            f"parameters.prior({parameter.path!r}, ...)."
        )
    return dist.Uniform(float(low), float(high))


class _Sky(eqx.Module):
    """The sky in each channel of an observation.

    Attributes
    ----------
    level, error : arrays, shape (channel,)
        Flux per pixel in the middle of the observation, and how well it is known.
    slope, slope_error : arrays, shape (channel, 2)
        Its change per pixel along (y, x).
    scatter : array, shape (channel,)
        Standard deviation of a pixel.
    """

    level: np.ndarray
    error: np.ndarray
    slope: np.ndarray
    slope_error: np.ndarray
    scatter: np.ndarray


class _Appearance(eqx.Module):
    """What an observation shows of a scene.

    Attributes
    ----------
    channels : array of int, shape (channel,)
        Channels of the frame.
    pixel : float
        Side of a pixel, in model pixels.
    psf_sigma : array, shape (channel,)
        In pixels.
    flux_error : array, shape (channel,)
        Standard error of the flux of a point; infinite in a channel without data.
    sky : _Sky
    light : array, shape (component, channel)
        Aperture fluxes, 0 where they aren't significant.
    radius : array, shape (component, channel)
        Half-light radii of these, the PSF taken out, in model pixels.
    """

    channels: np.ndarray
    pixel: float
    psf_sigma: np.ndarray
    flux_error: np.ndarray
    sky: _Sky
    light: np.ndarray
    radius: np.ndarray


def _guesses(scene: Scene, observations: Sequence[Observation], parameters: Parameters) -> dict[str, tuple]:
    """Return the centre and the width of the prior of every parameter that has a normal one, by path."""
    starts = _starts(scene, observations)
    views = [_view(scene, obs, parameters) for obs in observations]
    finest = max(1.0, min(view.pixel for view in views))
    fwhm = 2 * HALF_LIGHT_PER_SIGMA * min(view.pixel * float(view.psf_sigma.min()) for view in views)
    guesses = {}
    for number, (path, component) in enumerate(scene.components()):
        guesses[f"{path}.center"] = starts[f"{path}.center"], finest
        guesses[f"{path}.morphology.ellipticity"] = 0.0, ELLIPTICITY_SCATTER
        size = f"{path}.morphology.half_light_radius"
        radius = starts.get(size, np.zeros(()))
        measured = max(float(view.radius[number].max()) for view in views)
        guesses[size] = radius, np.maximum(radius, measured + fwhm)
        width = _flux_width(scene.frame.channels, component.spectrum, views, number, float(radius.max()))
        guesses[f"{path}.spectrum.flux"] = starts[f"{path}.spectrum.flux"], width
    for obs, view in zip(observations, views, strict=True):
        base, sky = f"observations.{obs.name}", view.sky
        shift = f"{base}.astrometry.shift"
        guesses[shift] = starts[shift], 1.0 if obs.wcs is None else pixel_scale_of(obs.wcs)
        rotation = f"{base}.astrometry.rotation"
        guesses[rotation] = starts[rotation], np.rad2deg(2 / max(obs.shape[1:]))
        guesses[f"{base}.background"] = sky.level, SKY_ERRORS * sky.error
        guesses[f"{base}.background_slope"] = sky.slope, SKY_ERRORS * sky.slope_error
        for name, kind in obs.noise.parameters.items():
            guesses[f"{base}.noise.{name}"] = (0.0, sky.scatter) if kind.scales_with_data else (1.0, SCALE_WIDTH)
    return guesses


def _flux_width(channels, spectrum, views, number, radius) -> np.ndarray:
    """Return the widths of the priors of a component's fluxes."""
    light, error = np.zeros(len(channels)), np.full(len(channels), np.inf)
    for view in views:
        # The error of a known shape grows as the root of its area.
        widening = np.hypot(1.0, radius / HALF_LIGHT_PER_SIGMA / (view.pixel * view.psf_sigma))
        np.maximum.at(light, view.channels, view.light[number])
        np.minimum.at(error, view.channels, view.flux_error * widening)
    flux, entries = np.abs(np.asarray(spectrum.flux, dtype=float)), spectrum.layout(channels)
    shown = [entries == entry for entry in range(len(flux))]
    light = np.array([light[where].max(initial=0.0) for where in shown])
    error = np.array([error[where].min(initial=np.inf) for where in shown])
    # What no image shows is given the largest error of what one does.
    known = error[np.isfinite(error)]
    error = np.where(np.isfinite(error), error, known.max() if len(known) else 1.0)
    return np.maximum(flux, light + FLUX_ERRORS * error)


def _view(scene: Scene, obs: Observation, parameters: Parameters) -> _Appearance:
    """Return what an observation shows of a scene."""
    frame, count = scene.frame, len(obs.channels)
    centers = np.array([np.asarray(c.center, dtype=float) for _, c in scene.components()]).reshape(-1, 2)
    y, x = obs.apparent_positions(centers, frame).T
    # What can't be seen from here is far away.
    positions = np.nan_to_num(pixel_map(frame.wcs, obs.wcs, y, x), nan=-1e6)
    psf_sigma = np.broadcast_to(obs.psf.effective_sigma, count)
    groups, group, distance = _nearest(positions, obs.shape[1:], max(1.0, float(psf_sigma.max())))
    base = f"observations.{obs.name}"
    sky = _measure_sky(obs, distance, parameters.is_fitted(f"{base}.background_slope"))
    level = sky.level if parameters.is_fitted(f"{base}.background") else obs.background
    image = obs.data - obs.with_background(level, sky.slope).background_image()
    pixel = 1.0 if obs.wcs is None else pixel_scale_of(obs.wcs) / frame.pixel_scale
    light, radius = np.zeros((2, len(centers), count))
    for c, valid in enumerate(obs.noise.valid if len(centers) else ()):
        pixels = image[c][valid], group[valid], distance[valid]
        flux, size = _grow(*pixels, int(groups.max()) + 1, float(sky.scatter[c]), float(psf_sigma[c]))
        light[:, c], radius[:, c] = flux[groups], pixel * size[groups]
    seen = obs.noise.valid.any(axis=(1, 2))
    return _Appearance(
        channels=np.array(frame.channel_index(obs.channels)),
        pixel=pixel,
        psf_sigma=psf_sigma,
        flux_error=np.where(seen, sky.scatter * np.sqrt(4 * np.pi) * psf_sigma, np.inf),
        sky=sky,
        light=light,
        radius=radius,
    )


def _nearest(positions, shape, closest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the groups of positions closer than `closest`; and of each pixel the nearest group and how far it is."""
    if len(positions) == 0:
        return np.zeros(0, int), np.zeros(shape, int), np.full(shape, np.inf)
    tree = cKDTree(positions)
    first, second = tree.query_pairs(closest, output_type="ndarray").T
    links = coo_matrix((np.ones(len(first)), (first, second)), shape=(len(positions), len(positions)))
    _, groups = connected_components(links, directed=False)
    y, x = np.mgrid[: shape[0], : shape[1]]
    distance, nearest = tree.query(np.stack([y, x], axis=-1))
    return groups, groups[nearest], distance


def _measure_sky(obs: Observation, distance: np.ndarray, fit_slope: bool) -> _Sky:
    """Return the sky of an observation, its slope the observation's own unless it is to be fitted."""
    noise = obs.noise.level()
    y, x = np.mgrid[: obs.shape[1], : obs.shape[2]] - 0.5 * (np.array(obs.shape[1:]) - 1)[:, None, None]
    level, slope = obs.background.astype(float), obs.background_slope.astype(float)
    error, scatter = noise.astype(float), noise.astype(float)
    extent = np.tile(np.array(obs.shape[1:], dtype=float), (len(noise), 1))
    for c, valid in enumerate(obs.noise.valid):
        if valid.sum() < FEWEST_PIXELS:
            continue
        far = valid & (distance >= np.median(distance[valid]))
        values, away = obs.data[c][far], distance[far]
        places = np.stack([y[far], x[far]])
        kept, slope[c] = _clipped(values, places, slope[c], fit_slope)
        rest, away = (values - slope[c] @ places)[kept], away[kept]
        nearer = away < np.median(away)
        wings = rest[nearer].mean() - rest[~nearer].mean() if nearer.any() else 0.0
        level[c], scatter[c] = rest.mean(), max(rest.std(), noise[c])
        error[c] = np.sqrt(scatter[c] ** 2 / len(rest) + wings**2 + (rest.mean() - np.median(rest)) ** 2)
        extent[c] = np.maximum(np.sqrt(np.mean(places[:, kept] ** 2, axis=1)), 0.5)
    return _Sky(level=level, error=error, slope=slope, slope_error=error[:, None] / extent, scatter=scatter)


def _clipped(values, places, slope, fit_slope: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return which values aren't outliers from a plane, and its slope: the given one, or that which fits best."""
    kept = np.ones(len(values), bool)
    for _ in range(CLIP_ROUNDS):
        if fit_slope:
            design = np.column_stack([np.ones(kept.sum()), *places[:, kept]])
            slope = np.linalg.lstsq(design, values[kept], rcond=None)[0][1:]
        rest = values - slope @ places
        off = np.abs(rest - np.median(rest[kept]))
        # Most counts may be equal.
        kept = off <= CLIP * (1.4826 * np.median(off[kept]) or rest[kept].std())
    return kept, slope


def _grow(values, group, distance, count, scatter, psf_sigma) -> tuple[np.ndarray, np.ndarray]:
    """Return flux and half-light radius, the PSF taken out, of `count` groups of positions; 0 where there is nothing.

    Rings are added up to the first two in a row whose light is below its standard error.
    """
    steps = np.ceil(np.log(distance.max(initial=1.0)) / np.log(APERTURE_RATIO))
    edges = APERTURE_RATIO ** np.arange(steps + 2)
    slot = group * len(edges) + np.searchsorted(edges, distance)
    rings = np.bincount(slot, values, minlength=count * len(edges)).reshape(count, -1)
    pixels = np.bincount(slot, minlength=count * len(edges)).reshape(count, -1)
    is_dark = (rings <= scatter * np.sqrt(pixels)) & (pixels > 0) & (edges > max(1.0, 2 * psf_sigma))
    is_end = is_dark[:, :-1] & is_dark[:, 1:]
    last = np.where(is_end.any(axis=1), is_end.argmax(axis=1) - 1, len(edges) - 1)
    light, row = rings.cumsum(axis=1), np.arange(count)
    total, area = light[row, last], pixels.cumsum(axis=1)[row, last]
    flux = np.where(total > SIGNIFICANT * scatter * np.sqrt(area), total, 0.0)
    radius = edges[(light >= 0.5 * flux[:, None]).argmax(axis=1)]
    radius = np.sqrt(np.maximum(radius**2 - (HALF_LIGHT_PER_SIGMA * psf_sigma) ** 2, 0.0))
    return flux, np.where(flux > 0, radius, 0.0)
