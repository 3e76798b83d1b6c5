"""Errors of fluxes and offsets in blends whose sharpest image has correlated noise.

    python correlated_blends.py [--blends 300] [--fields 20] [--json]

Each blend: three Sersic galaxies and a star, drawn by GalSim on a space image of 0.03 arcsec pixels, whose noise is white noise
through [1, 2, 1] x [1, 2, 1] as after drizzling, and on a ground image in two bands of 0.168 arcsec pixels with white noise,
displaced by an unknown offset. All positions, shapes, fluxes and the offset are fitted, from catalogue positions that are off by
0.02 arcsec and shapes that are off by ten per cent, once with the noise as it is and once taken for white. Pulls: differences
from the truth over the stated error. Biases of magnitudes are in units of the scatter, over all sources.

Then the ground image of some fields is resampled to pixels as small as those of the space image, turned by 23 degrees, and
fitted in place of the native one: differences of fluxes, and what they should scatter by. Both estimates are, to first order,
linear in the noise, and in the same noise: that of the native pixels, which the resampling A turns into that of the others. With
the derivatives J of the model, the inverse covariances P that the fits assume and the information H = sum of J^T P J over both
images, an estimate changes by H^-1 J^T P n, so that the difference has a covariance that is known exactly. (The root of the
difference of the two squared errors is the same in theory; but both are small, and of two fits at two places.)
"""

from __future__ import annotations

import argparse
import json
import time
import warnings

import galsim
import jax
import jax.numpy as jnp
import numpy as np
from astropy.coordinates import SkyCoord
from astropy.wcs import WCS
from numpy.typing import NDArray

import scenefit as sf
from scenefit.data.resample import Resampling
from scenefit.infer import posterior

Array = NDArray[np.float64]
KERNEL = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25])
CORRELATION = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 36
SPACE, GROUND = 0.03, 0.168
SIZES = {"space": 150, "ground": 32}
PSFS = {"space": galsim.Gaussian(fwhm=0.1), "ground": galsim.Moffat(beta=3.5, fwhm=0.7)}
SIGMAS = {"space": np.array([1.0]), "ground": np.array([1.0, 1.0])}
CHANNELS = {"space": ["F814W"], "ground": ["g", "i"]}
ALL = ("F814W", "g", "i")
ORDER = 5


def header(scale: float, size: int, rotation: float = 0.0) -> WCS:
    """Return a tangent projection about one point of the sky."""
    wcs, turn = WCS(naxis=2), np.deg2rad(rotation)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN", "DEC--TAN"], [150.0, 2.0], [(size + 1) / 2] * 2
    wcs.wcs.cd = scale / 3600 * np.array([[-np.cos(turn), np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    wcs.pixel_shape = (size, size)
    return wcs


def truth(rng: np.random.Generator) -> list[dict]:
    """Return the sources: offsets from the middle (arcsec, east and north), shapes and fluxes per channel."""
    sources: list[dict] = []
    while len(sources) < 4:
        place = rng.uniform(-1.2, 1.2, 2)
        if any(np.hypot(*(place - other["place"])) < 0.45 for other in sources):
            continue
        ellipticity = rng.uniform(-0.3, 0.3, 2)
        sources.append(
            {
                "place": place,
                "star": len(sources) == 3,
                "radius": rng.uniform(0.15, 0.35),
                "index": rng.uniform(0.8, 2.5),
                "ellipticity": ellipticity,
                "flux": rng.uniform(1, 3) * np.array([2500.0, 300.0, 600.0]) * rng.uniform(0.7, 1.4, 3),
            }
        )
    return sources


def profile(source: dict) -> galsim.GSObject:
    """Return a source of unit flux on the sky, x to the west."""
    if source["star"]:
        return galsim.DeltaFunction()
    # Scenefit's ellipticity is (1 - q) / (1 + q), as GalSim's g; its position angle runs from north to east.
    e1, e2 = source["ellipticity"]
    return galsim.Sersic(source["index"], half_light_radius=source["radius"]).shear(g1=e1, g2=e2)


def draw(sources: list[dict], kind: str, offset: Array, rng: np.random.Generator) -> Array:
    """Return an image (channel, y, x) with noise."""
    size, scale = SIZES[kind], {"space": SPACE, "ground": GROUND}[kind]
    planes = np.zeros((len(CHANNELS[kind]), size, size))
    for source in sources:
        seen = galsim.Convolve(profile(source), PSFS[kind])
        east, north = source["place"] + offset
        image = galsim.Image(size, size, dtype=float)
        seen.shift(-east, north).drawImage(image, scale=scale)
        flux = [source["flux"][ALL.index(channel)] for channel in CHANNELS[kind]]
        planes += np.array(flux)[:, None, None] * image.array
    white = rng.standard_normal((len(planes), size + 4, size + 4))
    if kind == "space":
        power = np.fft.fft2(KERNEL, white.shape[1:])
        white = np.fft.ifft2(np.fft.fft2(white) * power).real / np.sqrt((KERNEL**2).sum())
    return planes + SIGMAS[kind][:, None, None] * white[:, 4:, 4:]


def observe(data: Array, kind: str, correlated: bool) -> sf.Observation:
    """Return the observation of an image."""
    scale = {"space": SPACE, "ground": GROUND}[kind]
    stamp = PSFS[kind].drawImage(nx=31, ny=31, scale=scale).array.astype(float)
    weights = np.ones_like(data) / SIGMAS[kind][:, None, None] ** 2
    noise = sf.CorrelatedNoise(weights, CORRELATION) if correlated and kind == "space" else sf.WhiteNoise(weights)
    return sf.Observation(
        data,
        noise=noise,
        psf=sf.ImagePSF(stamp),
        wcs=header(scale, SIZES[kind]),
        channels=CHANNELS[kind],
        name=kind,
    )


def start(sources: list[dict], frame: sf.Frame, rng: np.random.Generator) -> sf.Scene:
    """Return where the fit begins."""
    middle = SkyCoord(150.0, 2.0, unit="deg").skyoffset_frame()
    result = {}
    for number, source in enumerate(sources):
        east, north = source["place"] + rng.normal(0, 0.02, 2)
        center = SkyCoord(east, north, unit="arcsec", frame=middle).icrs
        spectrum = sf.ArraySpectrum([source["flux"][ALL.index(channel)] for channel in frame.channels])
        morphology = sf.PointMorphology()
        if not source["star"]:
            off = 1 + 0.1 * rng.standard_normal(2)
            # GalSim's x points west here, as the pixels do; the model's first component is along them, too.
            morphology = sf.SersicMorphology(
                source["radius"] * off[0] / frame.pixel_scale, source["index"] * off[1], 0.9 * source["ellipticity"]
            )
        result[f"s{number}"] = sf.Source(center, spectrum, morphology)
    return sf.Scene(frame, result)


def fit_of(scene: sf.Scene, observations: list[sf.Observation], free_offset: bool) -> sf.FitResult:
    """Return the fit, with the offset of the ground image if asked for."""
    parameters = sf.Parameters.default(scene, observations)
    if free_offset:
        parameters = parameters.free("observations.ground.astrometry.shift")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sf.fit(scene, observations, parameters, progress=False)


def fluxes_in(result: sf.FitResult) -> tuple[Array, Array]:
    """Return fluxes and errors (source, channel)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = sf.catalog(result, model_error=False, progress=False)
    fluxes, errors = (
        np.stack([table[f"{what}_{channel}"] for channel in ALL], axis=-1) for what in ("flux", "flux_err")
    )
    return np.asarray(fluxes), np.asarray(errors)


def pulls(count: int) -> dict:
    """Return pulls of fluxes and offsets with the noise as it is and taken for white, and the bias of magnitudes."""
    found = {kind: {"flux": [], "offset": [], "magnitude": [], "seconds": []} for kind in ("correlated", "white")}
    for seed in range(count):
        rng = np.random.default_rng(seed)
        sources, offset = truth(rng), rng.normal(0, 0.03, 2)
        images = {kind: draw(sources, kind, offset * (kind == "ground"), rng) for kind in SIZES}
        for kind, into in found.items():
            observations = [observe(image, name, kind == "correlated") for name, image in images.items()]
            frame = sf.Frame.from_observations(observations, coverage="union")
            begin = time.perf_counter()
            result = fit_of(start(sources, frame, np.random.default_rng(seed)), observations, True)
            fluxes, errors = fluxes_in(result)
            shift = np.asarray(result.observations[1].astrometry.shift)
            shift_errors = np.asarray(sf.offset_errors(result, progress=False)["ground"])
            into["seconds"].append(time.perf_counter() - begin)
            true = np.array([source["flux"] for source in sources])
            into["flux"].append((fluxes - true) / errors)
            into["offset"].append((shift - offset) / shift_errors)
            into["magnitude"].append(-2.5 * np.log10(np.maximum(fluxes, 1e-3) / true))
    summary = {}
    for kind, values in found.items():
        flux, offset = np.array(values["flux"]), np.array(values["offset"])
        magnitude = np.array(values["magnitude"]).reshape(-1, len(ALL))
        bias = magnitude.mean(axis=0) / (magnitude.std(axis=0) / np.sqrt(len(magnitude)))
        summary[kind] = {
            "flux_pull_width": dict(zip(ALL, flux.reshape(-1, len(ALL)).std(axis=0), strict=True)),
            "flux_pull_mean": dict(zip(ALL, flux.reshape(-1, len(ALL)).mean(axis=0), strict=True)),
            "offset_pull_width": offset.std(axis=0).tolist(),
            "offset_pull_mean": offset.mean(axis=0).tolist(),
            "magnitude_bias": dict(zip(ALL, magnitude.mean(axis=0), strict=True)),
            "magnitude_bias_per_scatter": dict(zip(ALL, magnitude.mean(axis=0) / magnitude.std(axis=0), strict=True)),
            "magnitude_bias_per_standard_error": dict(zip(ALL, bias, strict=True)),
            "seconds": float(np.median(values["seconds"])),
        }
    return summary


@jax.jit
def derivatives(problem, state):
    """Return the whitened derivatives of both images along all coordinates, and those of the second whitened backwards, too."""
    _, along = jax.linearize(lambda vector: problem.residuals(posterior.State(vector, state.images))[0], state.vector)
    first, second = jax.lax.map(along, jnp.eye(len(state.vector)))
    _, back = jax.vjp(problem.images[1].noise.fisher_residual, problem.images[1].data)
    return first, second, jax.lax.map(lambda image: back(image)[0], second)


def estimator(scene: sf.Scene, observations: list[sf.Observation], parameters: sf.Parameters):
    """Return how an estimate depends on the noise: H^-1, J^T P J of the first image and J^T P of the second, by coordinate.

    Coordinates of fluxes are in data units, those of the rest in the problem's own. Also which are the fluxes (source, channel).
    """
    matched = [obs if obs.renderer is not None else obs.match(scene.frame) for obs in observations]
    problem, state, layout = posterior.build(scene, matched, parameters)
    first, second, back = (np.asarray(each, float) for each in derivatives(problem, state))
    scale, places = np.ones(len(first)), []
    for where, unit in posterior.flux_coordinates(problem, layout):
        scale[where] = 1 / unit
        places.append(where)
    first, second = (scale[:, None] * each.reshape(len(scale), -1) for each in (first, second))
    score = np.zeros((len(scale), *matched[1].shape))
    score[(..., *matched[1].renderer.window.slices)] = back / layout.noise_level[1][:, None, None]
    score *= scale[:, None, None, None]
    information = first @ first.T
    return np.linalg.inv(information + second @ second.T), information, score, np.array(places)


def expected_scatter(scene: sf.Scene, space, ground, other, parameters: sf.Parameters, target: WCS) -> Array:
    """Return the standard deviations of the differences of fluxes (source, channel) of fits to native and resampled images."""
    native, information, score, places = estimator(scene, [space, ground], parameters)
    coarse, _, other_score, _ = estimator(scene, [space, other], parameters)
    resampling = Resampling.between(ground.wcs, ground.shape[1:], target, other.shape[1:], ORDER)
    maps = [resampling.matrix(rows) for rows in resampling.rows(ground.noise.valid)]
    flat = other_score.reshape(len(coarse), len(maps), -1)
    planes = [(matrix.T @ flat[:, c].T).T for c, matrix in enumerate(maps)]
    pulled = np.stack(planes, axis=1).reshape(len(coarse), -1)
    change = coarse @ pulled - native @ score.reshape(len(native), -1)
    # The weights of the native pixels are 1.
    covariance = change @ change.T + (coarse - native) @ information @ (coarse - native)
    return np.sqrt(np.diag(covariance))[places]


def resampled(count: int) -> dict:
    """Return the differences of fluxes of fits to resampled ground images from those to native ones."""
    differences, expected = [], []
    for seed in range(1000, 1000 + count):
        rng = np.random.default_rng(seed)
        sources = truth(rng)
        ground = observe(draw(sources, "ground", np.zeros(2), rng), "ground", False)
        space = observe(draw(sources, "space", np.zeros(2), rng), "space", True)
        target = header(SPACE, 170, 23.0)
        other = sf.CorrelatedObservation.from_observation(ground, target, order=ORDER)
        frame = sf.Frame.from_observations([space, ground], coverage="union")
        scene = start(sources, frame, rng)
        both = [fit_of(scene, [space, each], False) for each in (ground, other)]
        fluxes = [fluxes_in(result)[0] for result in both]
        differences.append((fluxes[1] - fluxes[0])[:, 1:])
        expected.append(expected_scatter(both[0].scene, space, ground, other, both[0].parameters, target)[:, 1:])
    values, scatter = np.array(differences).ravel(), np.array(expected).ravel()
    return {
        "mean_difference_per_standard_error": float(values.mean() / (values.std() / np.sqrt(len(values)))),
        "scatter": float(values.std()),
        "expected_scatter": float(np.sqrt((scatter**2).mean())),
        "pull_width": float((values / scatter).std()),
        "pull_mean": float((values / scatter).mean()),
        "largest_pull": float(np.abs(values / scatter).max()),
    }


def main():
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blends", type=int, default=300, help="simulated blends")
    parser.add_argument("--fields", type=int, default=20, help="fields whose ground image is resampled")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    figures = {"pulls": pulls(arguments.blends), "resampled": resampled(arguments.fields)}
    for kind, values in figures["pulls"].items():
        print(f"noise taken as {kind}: {values['seconds']:.2f} s a blend")
        for channel in ALL:
            width, mean, bias, relative = (
                values[name][channel]
                for name in ("flux_pull_width", "flux_pull_mean", "magnitude_bias", "magnitude_bias_per_scatter")
            )
            print(
                f"  {channel:6} pulls {width:5.2f} wide, mean {mean:+.2f}; magnitudes {bias:+.4f} ({relative:+.2f} of an error)"
            )
        widths = ", ".join(f"{width:.2f}" for width in values["offset_pull_width"])
        print(f"  offset pulls (east, north) {widths} wide")
    values = figures["resampled"]
    print(
        f"resampled - native fluxes: mean {values['mean_difference_per_standard_error']:+.2f} standard errors, scatter "
        f"{values['scatter']:.2f}, expected {values['expected_scatter']:.2f}; pulls {values['pull_width']:.2f} wide, mean "
        f"{values['pull_mean']:+.2f}, largest {values['largest_pull']:.1f}"
    )
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
