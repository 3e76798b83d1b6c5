"""Images of unlike scale, fitted jointly: one galaxy, a group of them, and exposures that nobody stacked.

Surveys see the same galaxies with pixels of a quarter of an arcsecond or of almost three, sharply or not, turned or not. One
model is rendered here in the pixels of each image, and all are fitted together: nothing is resampled, convolved to a common PSF
or stacked, so the noise stays what it was and the sharpest image helps all others.

First, a galaxy in an r image, in W1 (turned by 20 degrees) and in NUV: nine parameters, with errors of axis ratio and position
angle from the posterior. Then a group of five that overlap, started from a photutils segmentation of the sharpest image. Last,
four dithered and rotated exposures of one band, each with its own PSF, of which three have the wrong coordinates.

    python 05_joint_survey_images.py

simulates the images with scenefit's renderer, on a finer grid than that of the fits, and writes figures 05_*.png into the
current folder. It takes little more than a minute.
"""

import dataclasses
import operator
from typing import NamedTuple

import astropy.units as u
import jax
import numpy as np
from astropy.convolution import Gaussian2DKernel, convolve
from astropy.coordinates import SkyCoord
from astropy.stats import gaussian_fwhm_to_sigma
from astropy.wcs import WCS
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from photutils.segmentation import SegmentationImage, SourceCatalog, detect_sources

import scenefit as sf

FIELD = SkyCoord(187.3119, 12.9783, unit="deg")
HALF_LIGHT_PER_SIGMA = np.sqrt(2 * np.log(2))  # of a round Gaussian


class Camera(NamedTuple):
    """An image to be: pixels a side, arcsec a pixel, FWHM of the PSF in arcsec, noise of a pixel, rotation, dither."""

    size: int
    scale: float
    fwhm: float
    sigma: float
    turn_deg: float = 0.0
    dither: tuple[float, float] = (0.0, 0.0)  # pixels (x, y)


class Galaxy(NamedTuple):
    """A Sersic profile on the sky: position (east, north) from FIELD and semi-major half-light radius in arcsec."""

    position: tuple[float, float]
    radius: float
    index: float
    axis_ratio: float
    angle_deg: float  # of the major axis, east of north
    flux: dict[str, float]


SURVEYS = {
    "r": Camera(500, 0.262, 1.12, 0.01),
    "W1": Camera(52, 2.75, 6.1, 5.0, turn_deg=20),
    "NUV": Camera(90, 1.5, 5.4, 0.003),
}
# The peaks are at 100, 30 and 5 times the noise of a pixel.
SINGLE = Galaxy((0.37, -0.53), 18.0, 1.8, 0.55, 40.0, {"r": 2701.0, "W1": 8835.0, "NUV": 2.576})
GROUP = {
    "a": Galaxy((-2.0, 3.0), 11.0, 2.6, 0.70, 30.0, {"r": 1500.0, "W1": 6000.0, "NUV": 0.5}),
    "b": Galaxy((15.0, -7.0), 8.0, 1.2, 0.45, 110.0, {"r": 700.0, "W1": 1500.0, "NUV": 2.0}),
    "c": Galaxy((-19.0, -6.0), 6.0, 1.0, 0.60, 75.0, {"r": 500.0, "W1": 1200.0, "NUV": 1.5}),
    "d": Galaxy((7.0, 20.0), 5.0, 3.0, 0.85, 160.0, {"r": 450.0, "W1": 2500.0, "NUV": 0.4}),
    "e": Galaxy((-4.0, -21.0), 7.0, 1.5, 0.50, 5.0, {"r": 500.0, "W1": 1500.0, "NUV": 1.0}),
}
EXPOSURES = {
    "first": Camera(80, 0.4, 0.95, 1.0, 8.0, (0.0, 0.0)),
    "second": Camera(80, 0.4, 1.30, 1.3, -31.0, (3.3, -2.6)),
    "third": Camera(80, 0.4, 1.10, 0.9, 67.0, (-2.7, -4.4)),
    "fourth": Camera(80, 0.4, 1.60, 1.6, 165.0, (-4.1, 3.8)),
}
DITHERED = Galaxy((0.2, 0.1), 3.0, 2.0, 0.6, 55.0, {"i": 6000.0})
# East and north in arcsec: where sources appear in these exposures, from where they should.
TRUE_SHIFTS = {"second": (0.13, -0.07), "third": (-0.21, 0.05), "fourth": (0.04, 0.18)}


def main():
    rng = np.random.default_rng(5)
    fit_one_galaxy(rng)
    fit_a_group(rng)
    fit_exposures(rng)


# What is simulated


def tangent_plane(camera: Camera) -> WCS:
    """Return the WCS of a camera: x west and y north before it was turned."""
    angle = np.deg2rad(camera.turn_deg)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], [FIELD.ra.deg, FIELD.dec.deg]
    wcs.wcs.crpix = (camera.size + 1) / 2 + np.array(camera.dither)
    wcs.wcs.cd = np.diag([-1.0, 1.0]) @ turn * camera.scale / 3600
    return wcs


def simulate(cameras, galaxies, rng, band=None, shifts=None) -> list[sf.Observation]:
    """Draw every camera's image of the galaxies; in a band of its name if no other is given."""
    images = []
    for name, camera in cameras.items():
        images.append(
            sf.Observation(
                np.zeros((camera.size, camera.size)),
                sigma=camera.sigma,
                # The PSF of the sky alone; pixels as wide as the PSF have to be integrated over.
                psf=sf.GaussianPSF(camera.fwhm * gaussian_fwhm_to_sigma / camera.scale, integrate_pixel=True),
                wcs=tangent_plane(camera),
                channels=band or name,
                name=name,
            )
        )
    frame = sf.Frame.from_observations(images)
    scene = sf.Scene(frame, {name: draw(galaxy, frame) for name, galaxy in galaxies.items()})
    observations = []
    for blank in images:
        clean = blank.with_shift((shifts or {}).get(blank.name, (0.0, 0.0))).render(scene)
        sigma = cameras[blank.name].sigma
        data = clean + sigma * rng.normal(size=clean.shape)
        observations.append(
            sf.Observation(data, sigma=sigma, psf=blank.psf, wcs=blank.wcs, channels=blank.channels, name=blank.name)
        )
    return observations


def draw(galaxy: Galaxy, frame: sf.Frame) -> sf.Source:
    """Return a galaxy as a source of a frame."""
    east, north = galaxy.position
    position = FIELD.spherical_offsets_by(east * u.arcsec, north * u.arcsec)
    # scenefit has the geometric mean of the semi-axes, in model pixels, and a pair of numbers instead of axis ratio and angle.
    radius = galaxy.radius * np.sqrt(galaxy.axis_ratio) / frame.pixel_scale
    norm = (1 - galaxy.axis_ratio**2) / (1 + galaxy.axis_ratio**2)
    theta = np.deg2rad(galaxy.angle_deg) + north_of(frame)
    pair = norm * np.array([np.cos(2 * theta), np.sin(2 * theta)])
    flux = [galaxy.flux[channel] for channel in frame.channels]
    return sf.Source(position, flux, sf.SersicMorphology(radius, galaxy.index, pair))


def placed(galaxy: Galaxy, frame: sf.Frame) -> sf.Source:
    """Return a galaxy as a source of a frame, with its position in pixels."""
    return draw(galaxy, frame).placed(frame)


def north_of(frame: sf.Frame) -> float:
    """Return the direction of north, counter-clockwise from +x; from there through east is counter-clockwise, too."""
    y, x = frame.sky_jacobian()[:, 1]
    return float(np.arctan2(y, x))


# How results are judged


def compare(title, rows):
    """Print values beside the truth, and fail where one is off by more than four standard errors."""
    print(f"\n{title}\n{'':28s}{'value':>12s}{'error':>10s}{'truth':>12s}{'pull':>7s}")
    pulls = {}
    for name, value, error, truth in rows:
        pulls[name] = (value - truth) / error
        digits = int(np.clip(2 - np.floor(np.log10(error)), 0, 6))
        print(f"{name:28s}{value:12.{digits}f}{error:10.{digits}f}{truth:12.{digits}f}{pulls[name]:+7.1f}")
    # A normal number exceeds four standard deviations once in 16000 times; the three tables have 61.
    assert np.abs(list(pulls.values())).max() < 4, pulls


def check_chi_square(result: sf.FitResult, num_parameters: int):
    """Fail if the chi-square isn't that of noise."""
    chi_square = sum(obs.chi_square(result.scene).sum() for obs in result.observations)
    freedom = sum(obs.noise.valid.sum() for obs in result.observations) - num_parameters
    scatter = np.sqrt(2 / freedom)
    print(f"chi-square per degree of freedom {chi_square / freedom:.4f}, expected 1 +- {scatter:.4f}")
    assert abs(chi_square / freedom - 1) < 4 * scatter


# One galaxy, three images


def fit_one_galaxy(rng):
    observations = simulate(SURVEYS, {"galaxy": SINGLE}, rng)
    for obs in observations:
        print(f'{obs.name}: {obs.shape[1:]} pixels of {SURVEYS[obs.name].scale}"')

    # The frame would have the pixels of the r image. With a PSF of 1.12" these are finer than they need be: half the PSF's
    # width is enough, and makes the model four times smaller.
    frame = sf.Frame.from_observations(observations, pixel_scale=0.55 * u.arcsec)
    print(f'model frame: {frame.shape} (channel, y, x), {frame.pixel_scale:.2f}" a pixel')

    # A round profile at the middle of the field. There is no flux in it yet: the first step of a fit solves for all fluxes.
    start = sf.SersicMorphology(10.0 / frame.pixel_scale, 1.5)
    scene = sf.Scene(frame, {"galaxy": sf.Source(FIELD, np.zeros(3), start)})
    result = sf.fit(scene, observations)
    print(
        f"{result.status.value} after {result.num_steps} steps and {result.timing['fit']:.1f} s, compilation included"
    )
    assert result.is_converged
    check_chi_square(result, 9)

    # Draws from the normal approximation of the posterior turn into any other quantity, errors and correlations included.
    posterior = sf.sample(result, "laplace", key=jax.random.key(0))
    assert posterior.status is sf.PosteriorStatus.GOOD, posterior.message
    derived = on_the_sky(posterior, "galaxy")
    # Angles come modulo 180 degrees: the branch nearest to the truth.
    derived["position angle [deg]"] = (
        SINGLE.angle_deg + (derived["position angle [deg]"] - SINGLE.angle_deg + 90) % 180 - 90
    )
    truth = [*SINGLE.position, SINGLE.radius, SINGLE.index, SINGLE.axis_ratio, SINGLE.angle_deg, *SINGLE.flux.values()]
    rows = [(n, v.mean(), v.std(), true) for (n, v), true in zip(derived.items(), truth, strict=True)]
    compare("one galaxy, three images", rows)
    sf.plot.scene(result.scene, result.observations).savefig("05_galaxy.png", dpi=150)


def on_the_sky(posterior: sf.Posterior, name: str) -> dict[str, np.ndarray]:
    """Return draws of what one would put into a table."""
    frame, base = posterior.result.scene.frame, f"sources.{name}."
    east, north = FIELD.spherical_offsets_to(frame.to_sky(posterior[base + "center"]))
    first, second = posterior[base + "morphology.ellipticity"].T
    norm = np.hypot(first, second)
    ratio = np.sqrt((1 - norm) / (1 + norm))
    radius = posterior[base + "morphology.half_light_radius"] / np.sqrt(ratio)
    return {
        "east [arcsec]": east.arcsec,
        "north [arcsec]": north.arcsec,
        "semi-major r50 [arcsec]": radius * frame.pixel_scale,
        "Sersic index": posterior[base + "morphology.sersic_index"],
        "axis ratio": ratio,
        "position angle [deg]": np.rad2deg(np.arctan2(second, first) / 2 - north_of(frame)),
        **dict(zip([f"flux {c}" for c in frame.channels], posterior[base + "spectrum.flux"].T, strict=True)),
    }


# Five galaxies


def fit_a_group(rng):
    observations = simulate(SURVEYS, GROUP, rng)
    sharpest = observations[0]
    segments, moments = segment(sharpest)
    frame = sf.Frame.from_observations(observations, pixel_scale=0.55 * u.arcsec)
    sources = {f"{row.label}": start_from_moments(row, sharpest, frame) for row in moments}
    print(f"\n{len(sources)} segments in {sharpest.name}")
    assert len(sources) == len(GROUP)

    # Every source has nine parameters: 45 in all.
    scene = sf.Scene(frame, sources)
    result = sf.fit(scene, observations)
    print(
        f"{result.status.value} after {result.num_steps} steps and {result.timing['fit']:.1f} s, compilation included"
    )
    assert result.is_converged
    check_chi_square(result, 45)

    # photutils numbers segments by place: find the galaxy that each one is.
    names = match_names(result, frame)
    errors, rows = sf.parameter_errors(result), []
    for label, name in names.items():
        source, base, truth = result.scene.sources[label], f"sources.{label}.", placed(GROUP[name], frame)
        parts = [(f"flux {c}", n, "spectrum.flux") for n, c in enumerate(frame.channels)]
        parts += [("y", 0, "center"), ("x", 1, "center"), ("radius", 0, "morphology.half_light_radius")]
        parts += [("index", 0, "morphology.sersic_index")]
        parts += [("e1", 0, "morphology.ellipticity"), ("e2", 1, "morphology.ellipticity")]
        for title, n, path in parts:
            get = operator.attrgetter(path)
            value, true = (float(np.ravel(get(each))[n]) for each in (source, truth))
            rows.append((f"{name} {title}", value, float(np.ravel(errors[base + path])[n]), true))
    compare("a group of five (lengths in model pixels)", rows)

    # The same on the sky: sizes in arcsec, angles east of north. (Fluxes and their errors are columns of the catalogue, too.)
    table = sf.catalog(result)["id", "ra", "dec", "half_light_radius", "axis_ratio", "position_angle", "snr"]
    for column in table.colnames[1:]:
        table[column].info.format = ".6f" if column in ("ra", "dec") else ".2f"
    print("\n" + "\n".join(table.pformat(max_width=-1)))
    sf.plot.scene(result.scene, result.observations).savefig("05_group.png", dpi=150)
    plot_segments(sharpest, segments, moments, scene, result.scene).savefig("05_segments.png", dpi=150)


def segment(obs: sf.Observation) -> tuple[SegmentationImage, SourceCatalog]:
    """Return segments of an image, and their moments.

    The threshold is high enough that galaxies which overlap come apart. (With scikit-image installed, photutils can deblend
    instead.) Moments above it are smaller than those of the whole galaxies; the fit doesn't mind.
    """
    smooth = convolve(obs.data[0], Gaussian2DKernel(2.5))
    segments = detect_sources(smooth, 22 * SURVEYS[obs.name].sigma, n_pixels=40)
    assert segments is not None
    return segments, SourceCatalog(obs.data[0], segments, convolved_data=smooth, wcs=obs.wcs)


def start_from_moments(row: SourceCatalog, obs: sf.Observation, frame: sf.Frame) -> sf.Source:
    """Return a source that looks like a segment, without flux."""
    major, minor = row.semimajor_axis.to_value("pix"), row.semiminor_axis.to_value("pix")
    ratio = SURVEYS[obs.name].scale / frame.pixel_scale
    # photutils has standard deviations along the axes, in pixels of that image, and an angle counter-clockwise from its +x.
    # The frame's axes are those of its finest image, which this is: only the scale differs.
    radius = HALF_LIGHT_PER_SIGMA * np.sqrt(major * minor) * ratio
    theta = row.orientation.to_value("rad")
    norm = (major**2 - minor**2) / (major**2 + minor**2)
    pair = norm * np.array([np.cos(2 * theta), np.sin(2 * theta)])
    # Sky coordinates are a position in every image.
    return sf.Source(row.sky_centroid_icrs, np.zeros(len(frame.channels)), sf.SersicMorphology(radius, 1.5, pair))


def match_names(result: sf.FitResult, frame: sf.Frame) -> dict[str, str]:
    """Return the name of the true galaxy nearest to each source."""
    true = {
        name: frame.to_pixel(FIELD.spherical_offsets_by(*(galaxy.position * u.arcsec)))
        for name, galaxy in GROUP.items()
    }
    names = {
        label: min(true, key=lambda name: np.hypot(*(true[name] - source.center)))
        for label, source in result.scene.sources.items()
    }
    assert sorted(names.values()) == sorted(GROUP)
    return names


def plot_segments(obs, segments, moments, start: sf.Scene, fitted: sf.Scene) -> Figure:
    """Show the image with the half-light ellipses at the start and after the fit."""
    fig = Figure(figsize=(9.2, 4.4), layout="constrained")
    left, right = fig.subplots(1, 2)
    left.imshow(segments.data, cmap=segments.make_cmap(seed=1), origin="lower", interpolation="nearest")
    left.set_title("segments, and the start")
    right.imshow(obs.data[0], norm=AsinhNorm(0.02, -0.02, 2), cmap="gray", origin="lower")
    right.set_title(f"{obs.name}, and the fit")
    scale = start.frame.pixel_scale / SURVEYS[obs.name].scale
    for ax, scene in ((left, start), (right, fitted)):
        for source in scene.sources.values():
            x, y = obs.wcs.world_to_pixel(scene.frame.to_sky(source.center))
            first, second = source.morphology.ellipticity
            norm = np.hypot(first, second)
            ratio = np.sqrt((1 - norm) / (1 + norm))
            width = 2 * float(source.morphology.half_light_radius) / np.sqrt(ratio) * scale
            angle = np.rad2deg(np.arctan2(second, first)) / 2
            ax.add_patch(Ellipse((x, y), width, width * ratio, angle=angle, fill=False, color="#E69F00", linewidth=1.5))
        ax.set(xlim=(90, 410), ylim=(90, 410), xticks=[], yticks=[])
    return fig


# Exposures


def fit_exposures(rng):
    exposures = simulate(EXPOSURES, {"galaxy": DITHERED}, rng, band="i", shifts=TRUE_SHIFTS)
    # All have the channel "i": the model has one image of it, which every exposure sees in its own way.
    frame = sf.Frame.from_observations(exposures)
    print(f"\nfour exposures, model channels {list(frame.channels)}")
    start = sf.SersicMorphology(2.0 / frame.pixel_scale, 1.5)
    scene = sf.Scene(frame, {"galaxy": sf.Source(FIELD, np.zeros(1), start)})
    parameters = sf.Parameters.default(scene, exposures)
    for name in TRUE_SHIFTS:
        parameters = parameters.free(f"observations.{name}.astrometry.shift")

    # The first exposure is the anchor. What is free of the others is fitted along with the galaxy.
    result = sf.fit(scene, exposures, parameters)
    print(
        f"{result.status.value} after {result.num_steps} steps and {result.timing['fit']:.1f} s, compilation included"
    )
    assert result.is_converged
    check_chi_square(result, 7 + 6)
    errors, rows = sf.parameter_errors(result), []
    for obs in result.observations[1:]:
        error = errors[f"observations.{obs.name}.astrometry.shift"]
        for direction, value, each, true in zip(("east", "north"), obs.astrometry.shift, error, TRUE_SHIFTS[obs.name]):
            rows.append((f"{obs.name} {direction} [mas]", 1e3 * value, 1e3 * each, 1e3 * true))
    flux_error = float(errors["sources.galaxy.spectrum.flux"][0])
    flux = result.scene.sources["galaxy"].spectrum.flux[0]
    rows.append(("flux i", flux, flux_error, DITHERED.flux["i"]))
    compare("four exposures, three with wrong coordinates", rows)

    # What each exposure alone would have measured follows from the curvature at the joint fit, without fits of their own.
    # Weights add up: the error of the four together would be that of the ideal stack if shapes were known, and is a little
    # less here, since what one exposure says about the shape helps the others.
    single = [flux_error_alone(result, obs) for obs in result.observations]
    together = np.sum(np.array(single) ** -2.0) ** -0.5
    for obs, error in zip(exposures, single):
        print(f"{obs.name:8s} alone: error of the flux {error:6.1f}")
    print(f"{'weights added':16s} {together:6.1f}\n{'joint fit':16s} {flux_error:6.1f}")
    assert 0.9 < flux_error / together < 1.01
    plot_exposures(result).savefig("05_exposures.png", dpi=150)


def flux_error_alone(result: sf.FitResult, obs: sf.Observation) -> float:
    """Return the error of the flux that one exposure leaves, with its coordinates taken as right."""
    parameters = sf.Parameters.default(result.scene, [obs])
    alone = dataclasses.replace(result, observations=(obs,), parameters=parameters)
    return float(sf.parameter_errors(alone)["sources.galaxy.spectrum.flux"][0])


def plot_exposures(result: sf.FitResult) -> Figure:
    """Show every exposure, with an arrow to the north, and its residuals."""
    fig = Figure(figsize=(9.0, 4.8), layout="constrained")
    axes = fig.subplots(2, len(result.observations))
    for obs, (upper, lower) in zip(result.observations, axes.T):
        sigma = obs.noise.level()[0]
        upper.imshow(obs.data[0] / sigma, norm=AsinhNorm(3, -3, 150), cmap="gray", origin="lower")
        north = obs.wcs.world_to_pixel(FIELD.directional_offset_by(0 * u.deg, 12 * u.arcsec))
        begin = obs.wcs.world_to_pixel(FIELD.directional_offset_by(0 * u.deg, 7 * u.arcsec))
        upper.annotate("", north, begin, arrowprops={"arrowstyle": "->", "color": "white"})
        upper.set_title(f'{obs.name}, {EXPOSURES[obs.name].fwhm}"', size="medium")
        shown = lower.imshow(obs.residual(result.scene)[0] / sigma, vmin=-4, vmax=4, cmap="RdBu_r", origin="lower")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    fig.colorbar(shown, ax=axes[1], label="residual / σ")
    return fig


if __name__ == "__main__":
    main()
