"""What sources are made of: points, disks, disks with clumps, disks with bulges, as the sharpest image asks for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpyro.distributions as dist

from scenefit.arrays.box import Box
from scenefit.arrays.profiles import SERSIC_RANGE
from scenefit.data.observation import Observation
from scenefit.infer.fit import fit
from scenefit.model.clumpy import ClumpyMorphology
from scenefit.model.morphology import PointMorphology, SersicMorphology, parameter_values
from scenefit.model.scene import Scene
from scenefit.model.source import AbstractSource, CompositeSource, Source
from scenefit.sky.frame import Frame, pixel_map, pixel_scale_of, with_channels
from scenefit.survey.clumps import find_clumps, single_sources
from scenefit.survey.envelopes import RING_SIGMAS, Envelope, psf_width, ring_radius

POINT_RADIUS = 0.75
"""A source of a smaller half-light radius, in widths of the sharpest PSF, is taken for a point."""
UNSEEN, UNSEEN_RADIUS = 3.0, 4.0
"""Significance in the sharpest image below which a source has no shape there; and the first half-light radius, in widths of the
PSF, of such ones, and where that image has no data."""
SINGLE_INDEX, SINGLE_SIZE = (1.5, 0.8), 0.4
"""Sersic index of the first, single profiles: mean and standard deviation of the prior; width of that of the logarithm of the
radius."""
FIRST_TOLERANCE, FIRST_STEPS = 0.2, 15
"""Tolerance of the first fit, to the sharpest image alone, and its steps at most."""
DISK_INDEX, BULGE_INDEX = (1.1, 0.25), (2.7, 0.6)
"""Mean and standard deviation of the priors of the Sersic indices."""
DISK_SIZE, BULGE_SIZE = 1.1, 0.45
"""Medians of the log-normal priors of the half-light radii, in units of that of the single profile."""
DISK_SPREAD, BULGE_SPREAD, SIZE_ERROR = 0.25, 0.35, 6.0
"""Widths of these priors in the logarithm; that of a disk is wider for faint sources, by so much over their significance."""
FIRST_SCATTER, CENTER_SCATTER = 1.0, 3.0
"""Widths of the priors of centers about the given positions, in widths of the sharpest PSF: in the first fit, where faint sources
are drawn to what single profiles leave of bright ones, and then."""
SEEN_WITHIN = 6.0
"""A source is seen in an image that has data within so many widths of its PSF: the core of a star may be saturated."""
ELLIPTICITY_SCATTER = 0.35
"""Width of the priors of ellipticities, each component."""
SHARE_SLOPE, SHARE_FROM, SHARE_RANGE = 0.2, 1.1, (0.03, 0.8)
"""Share of a bulge in the light for each unit of the index of the single profile, from which index on, and its range."""
TYPICAL_SHARE, TRUSTED, LEAST_SHARE = 0.2, 12.0, 0.06
"""Share of the bulge of sources too faint to tell; significance at which it is half that, half what the index says; and the
least one that is modelled."""
SHARE_ERROR = 0.5
"""Width of the prior of a bulge's fluxes, in units of their means."""
IRREGULAR = 0.05
"""Share of clumps in the light above which a source is irregular, and has no bulge."""
MAX_CLUMP_SHARE = 0.6
"""Share of clumps in the light of a disk at most."""


def automatic_scene(
    frame: Frame,
    sharpest: Observation,
    envelopes: Mapping[str, Envelope],
    fluxes: np.ndarray,
    progress: bool = False,
) -> tuple[Scene, dict[str, float]]:
    """Return a scene of the families that the sharpest image asks for, with priors, and how significant its sources are there.

    Single Sersic profiles, or points, are fitted to the sharpest image. In what they leave, clumps are looked for
    (`scenefit.survey.clumps`). A source that isn't a point becomes a disk of index 1.1 +- 0.25, its clumps part of it, and a
    concentric bulge of index 2.7 +- 0.6, unless clumps make it irregular. The share of the bulge grows with the index of the
    single profile; for faint sources it tends to a typical one. Sizes have log-normal priors about those of the single profile.

    Parameters
    ----------
    frame : Frame
    sharpest : Observation
    envelopes : mapping of str to Envelope
        By source.
    fluxes : array, shape (source, channel)
        Of all light of a source.
    progress : bool
        Whether to show progress bars.

    Returns
    -------
    scene : Scene
        Point: a `Source`. Disk alone: a `Source`. Disk and bulge: a concentric `CompositeSource` of these parts.
    significances : dict of float
        Of the single profiles, the sharpest image alone, of the sources where it has data.
    """
    sigma = psf_width(frame, sharpest)
    single = with_channels(frame, sharpest.channels)
    shown = list(frame.channel_index(sharpest.channels))
    flux_of = dict(zip(envelopes, fluxes, strict=True))
    seen = {name: envelope for name, envelope in envelopes.items() if _is_seen(frame, sharpest, envelope.center)}
    first = Scene(single, {name: _single(each, flux_of[name][shown], sigma) for name, each in seen.items()})
    result = fit(first, [sharpest], rtol=FIRST_TOLERANCE, max_steps=FIRST_STEPS, progress=progress)
    clumps = find_clumps(result, sigma)
    # A profile of any size where the sharpest image says nothing.
    sources: dict[str, AbstractSource] = {
        name: _profile(envelope, flux_of[name], UNSEEN_RADIUS * sigma, np.inf, CENTER_SCATTER * sigma)
        for name, envelope in envelopes.items()
    }
    significances = {}
    for name, source in single_sources(result.scene).items():
        significances[name] = significance = _significance(source, sharpest, frame, sigma)
        if significance < UNSEEN and not len(clumps[name][0]):
            continue
        source = source.replace(priors=source.priors | _center_prior(envelopes[name].center, CENTER_SCATTER * sigma))
        sources[name] = _family(source, flux_of[name], *clumps[name], significance)
    return Scene(frame, sources), significances


def _is_seen(frame: Frame, obs: Observation, center: np.ndarray) -> bool:
    """Return whether an observation has a pixel with information near a position on the frame."""
    place = pixel_map(frame.wcs, obs.wcs, center[0], center[1])
    box = Box.around(tuple(place), int(np.ceil(SEEN_WITHIN * obs.psf.effective_sigma.min())))
    box = box.intersection(Box((obs.shape[1], obs.shape[2])))
    return bool(obs.noise.valid[(slice(None), *box.slices)].any())


def _single(envelope: Envelope, flux: np.ndarray, sigma: float) -> Source:
    """Return a point, or a single profile as the envelope has it."""
    radius = ring_radius(RING_SIGMAS, envelope.amplitudes, 0.5)
    if radius < POINT_RADIUS * sigma:
        return Source(envelope.center, flux, PointMorphology(), _center_prior(envelope.center, FIRST_SCATTER * sigma))
    return _profile(envelope, flux, radius, SINGLE_SIZE, FIRST_SCATTER * sigma)


def _profile(envelope: Envelope, flux: np.ndarray, radius: float, spread: float, scatter: float) -> Source:
    """Return a single profile that starts with a radius; `scatter` is that of its center."""
    morphology = SersicMorphology(radius, SINGLE_INDEX[0], envelope.ellipticity)
    priors = _center_prior(envelope.center, scatter) | _shape_priors(radius, spread, SINGLE_INDEX)
    return Source(envelope.center, flux, morphology, priors)


def _center_prior(center: np.ndarray, scatter: float) -> dict[str, dist.Distribution]:
    """Return the prior of a center."""
    return {"center": dist.Normal(center, scatter)}


def _shape_priors(radius: float, spread: float, index: tuple[float, float]) -> dict[str, dist.Distribution]:
    """Return the priors of the shape of a Sersic profile; none of the radius if that may be anything."""
    size = {"morphology.half_light_radius": dist.LogNormal(np.log(radius), spread)} if np.isfinite(spread) else {}
    return size | {
        "morphology.sersic_index": dist.TruncatedNormal(*index, low=SERSIC_RANGE[0], high=SERSIC_RANGE[1]),
        "morphology.ellipticity": dist.Normal(0.0, ELLIPTICITY_SCATTER),
    }


def _significance(source: Source, obs: Observation, frame: Frame, sigma: float) -> float:
    """Return the flux of a source over its error in an aperture of its half-light radius, the correlation of noise included."""
    scale = 1.0 if frame.wcs is None else pixel_scale_of(obs.wcs) / frame.pixel_scale
    radius = np.hypot(float(getattr(source.morphology, "half_light_radius", 0.0)), sigma) / scale
    _, correlation = obs.noise.independent()
    ratio = 1.0 if correlation is None else np.maximum(np.asarray(correlation).sum(axis=(1, 2)), 1e-3)
    error = obs.noise.level() * np.sqrt(ratio)
    flux = np.asarray(source.spectrum.flux, float)
    return float(np.sqrt(np.sum((flux / error) ** 2)) / (2 * np.sqrt(np.pi) * radius))


def _family(
    source: Source, flux: np.ndarray, offsets: np.ndarray, fractions: np.ndarray, significance: float
) -> AbstractSource:
    """Return what a source is made of, given its single profile, its clumps and its significance."""
    if not isinstance(source.morphology, SersicMorphology):
        return source.replace(spectrum=flux)
    shape = parameter_values(source.morphology)
    radius, index, ellipticity = float(shape["half_light_radius"]), float(shape["sersic_index"]), shape["ellipticity"]
    share = 0.0 if fractions.sum() > IRREGULAR else bulge_share(index, significance)
    size = (DISK_SIZE if share else 1.0) * radius
    spread = float(np.hypot(DISK_SPREAD, SIZE_ERROR / max(significance, 1e-3)))
    morphology = _disk(size, ellipticity, offsets, fractions / (1 - share))
    priors = {"center": source.priors["center"]} | _shape_priors(size, spread, DISK_INDEX)
    if isinstance(morphology, ClumpyMorphology):
        priors["morphology.shift"] = dist.Normal(0.0, source.priors["center"].scale)
    disk = Source(source.center, (1 - share) * flux, morphology, priors)
    if not share:
        return disk
    mean = share * np.maximum(flux, 1e-6 * flux.max())
    size = BULGE_SIZE * radius
    priors = _shape_priors(size, BULGE_SPREAD, BULGE_INDEX)
    priors["spectrum.flux"] = dist.TruncatedNormal(mean, SHARE_ERROR * mean, low=np.zeros_like(mean))
    bulge = Source(source.center, mean, SersicMorphology(size, BULGE_INDEX[0], 0.5 * ellipticity), priors)
    return CompositeSource({"disk": disk, "bulge": bulge}, concentric=True)


def bulge_share(index: float, significance: float) -> float:
    """Return the share of a bulge in a source's light, 0 for none, from the index of its single profile."""
    trust = 1 / (1 + (TRUSTED / max(significance, 1e-3)) ** 2)
    seen = float(np.clip(SHARE_SLOPE * (index - SHARE_FROM), *SHARE_RANGE))
    share = trust * seen + (1 - trust) * TYPICAL_SHARE
    return share if share > LEAST_SHARE else 0.0


def _disk(radius, ellipticity, offsets, fractions):
    """Return a disk, with clumps if there are any."""
    if not len(offsets):
        return SersicMorphology(radius, DISK_INDEX[0], ellipticity)
    fractions = fractions * min(1.0, MAX_CLUMP_SHARE / fractions.sum())
    return ClumpyMorphology(radius, DISK_INDEX[0], ellipticity, offsets, fractions)
