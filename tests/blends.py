"""Small blends of Gaussian galaxies seen by two instruments, drawn from the analytic formula in float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from scenefit.data.observation import Observation
from scenefit.infer.fit import FitResult, fit
from scenefit.model.morphology import GaussianMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from tests.helpers import tangent_wcs

FINE_SHAPE, FINE_SCALE, FINE_PSF = (40, 40), 0.1, 1.2
COARSE_SHAPE, COARSE_SCALE, COARSE_PSF = (16, 16), 0.25, 1.3
COARSE_ROTATION = 15.0
DISPLACEMENT, BACKGROUND = (0.04, -0.025), 2.5
CHANNELS = {"fine": ("v",), "coarse": ("g", "r")}


@dataclass
class Galaxy:
    """An elliptical Gaussian on the sky.

    `position` and `moments` are in arcsec from the middle of the field, (north, west): (y, x) of the fine image.
    """

    position: tuple[float, float]
    half_light_radius: float
    ellipticity: tuple[float, float]
    flux: dict[str, float]

    @property
    def moments(self) -> np.ndarray:
        """Second moments ((yy, xy), (xy, xx)) in arcsec squared, from semi-axes and position angle."""
        norm = np.hypot(*self.ellipticity)
        theta = 0.5 * np.arctan2(self.ellipticity[1], self.ellipticity[0])
        ratio = np.sqrt((1 - norm) / (1 + norm))
        sigma = self.half_light_radius / np.sqrt(2 * np.log(2))
        axes = np.diag([sigma**2 / ratio, sigma**2 * ratio])
        turn = np.array([[np.sin(theta), np.cos(theta)], [np.cos(theta), -np.sin(theta)]])
        return turn @ axes @ turn.T


GALAXIES = {
    "a": Galaxy((0.35, -0.42), 0.26, (0.30, 0.10), {"v": 900.0, "g": 500.0, "r": 1200.0}),
    "b": Galaxy((-0.30, 0.35), 0.20, (-0.10, 0.20), {"v": 500.0, "g": 450.0, "r": 700.0}),
    "c": Galaxy((0.72, 0.83), 0.24, (0.05, -0.25), {"v": 400.0, "g": 300.0, "r": 800.0}),
}


def gaussian_density(dy, dx, moments):
    """Return a Gaussian of unit integral with moments ((yy, xy), (xy, xx)) at offsets from its center."""
    inverse = np.linalg.inv(moments)
    exponent = inverse[0, 0] * dy**2 + 2 * inverse[0, 1] * dy * dx + inverse[1, 1] * dx**2
    return np.exp(-0.5 * exponent) / (2 * np.pi * np.sqrt(np.linalg.det(moments)))


def draw(galaxy, channel, shape, scale, psf_sigma, rotation_deg=0.0, shift=(0.0, 0.0)):
    """Return the noise-free image of a galaxy on an instrument's pixels, flux per pixel.

    `shift` is the displacement (east, north) in arcsec in which the image was taken.
    """
    angle = np.deg2rad(rotation_deg)
    # (north, west) of a pixel from (y, x): the axes of the image are turned by `rotation_deg` (see `tangent_header`).
    turn = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    inverse = np.linalg.inv(turn)
    place = np.add(galaxy.position, (shift[1], -shift[0]))
    center = inverse @ place + (np.array(shape) - 1) / 2
    moments = inverse @ galaxy.moments @ inverse.T + psf_sigma**2 * np.eye(2)
    y, x = np.mgrid[: shape[0], : shape[1]]
    return galaxy.flux[channel] * gaussian_density(y - center[0], x - center[1], moments)


def observe(
    galaxies=GALAXIES,
    *,
    seed=0,
    sigma=1.0,
    noise=True,
    shift=(0.0, 0.0),
    background=0.0,
    scale=1.0,
    dead=(),
    zeropoint=None,
    turn=0.0,
):
    """Return noisy observations of galaxies by instruments "fine" and "coarse" (turned; coarser pixels; two channels).

    Parameters
    ----------
    sigma : float
        Standard deviation of a pixel, in the unit of the fluxes.
    shift : (float, float)
        Displacement (east, north) of the coarse image in arcsec.
    background : float
        Flux per pixel added to the coarse image.
    scale : float
        What data and standard deviations of the coarse image are multiplied with, as if its unit were another.
    dead : sequence of str
        Channels whose weights are all 0.
    turn : float
        Angle in degrees by which the whole field, galaxies included, is turned on the sky: the data stay the same.
    """
    rng = np.random.default_rng(seed)
    result = []
    for name in ("fine", "coarse"):
        fine = name == "fine"
        shape = FINE_SHAPE if fine else COARSE_SHAPE
        pixel, psf, angle = (FINE_SCALE, FINE_PSF, 0.0) if fine else (COARSE_SCALE, COARSE_PSF, COARSE_ROTATION)
        offset = (0.0, 0.0) if fine else shift
        planes = []
        for channel in CHANNELS[name]:
            image = sum(draw(g, channel, shape, pixel, psf, angle, offset) for g in galaxies.values())
            image = image + (0.0 if fine else background)
            planes.append(image + sigma * rng.normal(size=shape) * noise)
        unit = 1.0 if fine else scale
        weights = np.array([0.0 if c in dead else 1 / (unit * sigma) ** 2 for c in CHANNELS[name]])
        result.append(
            Observation(
                unit * np.array(planes),
                weights=weights,
                psf=GaussianPSF(psf),
                wcs=tangent_wcs(shape, pixel, rotation_deg=angle + turn),
                channels=CHANNELS[name],
                name=name,
                zeropoint=zeropoint,
            )
        )
    return result


def frame_of(observations=None) -> Frame:
    """Return the model frame of the fine observation, with all channels."""
    return Frame.from_observations(observe() if observations is None else observations, coverage="intersection")


def on_frame(frame, galaxy):
    """Return the true center of a galaxy on the frame of `frame_of`, which has the pixels of the fine image."""
    assert frame.box.shape == FINE_SHAPE
    return np.array(galaxy.position) / FINE_SCALE + (np.array(FINE_SHAPE) - 1) / 2


def true_morphology(galaxy) -> GaussianMorphology:
    """Return the morphology of a galaxy on the fine pixels."""
    return GaussianMorphology(galaxy.half_light_radius / FINE_SCALE, galaxy.ellipticity)


def fluxes(frame, galaxy, scale=1.0):
    """Return the true flux of a galaxy in the channels of a frame, those of the coarse image times `scale`."""
    return np.array([galaxy.flux[c] * (scale if c in CHANNELS["coarse"] else 1.0) for c in frame.channels])


def true_scene(frame, galaxies=GALAXIES) -> Scene:
    """Return the scene that the observations show."""
    sources = {}
    for name, galaxy in galaxies.items():
        sources[name] = Source(on_frame(frame, galaxy), fluxes(frame, galaxy), true_morphology(galaxy))
    return Scene(frame, sources)


def rough_scene(frame, galaxies=GALAXIES, *, scale=1.0) -> Scene:
    """Return a start: round sources of the wrong size, flux and position."""
    sources = {}
    for n, (name, galaxy) in enumerate(galaxies.items()):
        flux = fluxes(frame, galaxy, scale) * (0.6 + 0.3 * n)
        center = np.add(on_frame(frame, galaxy), (0.4 - 0.3 * n, -0.3 + 0.2 * n))
        sources[name] = Source(center, flux, GaussianMorphology(1.3 * galaxy.half_light_radius / FINE_SCALE))
    return Scene(frame, sources)


def fit_blend(observations, galaxies=GALAXIES, *, free_coarse=False, scale=1.0, **options) -> FitResult:
    """Fit the blend from the rough start, with offset and background of the coarse image if asked for."""
    scene = rough_scene(frame_of(observations), galaxies, scale=scale)
    parameters = Parameters.default(scene, observations)
    if free_coarse:
        parameters = parameters.free("observations.coarse.astrometry.shift").free("observations.coarse.background*")
    return fit(scene, observations, parameters, progress=False, **options)


def chi_square(scene, observations) -> float:
    """Return the chi-square over the valid pixels whose centers lie on the frame, in float64."""
    total = 0.0
    for obs in observations:
        matched = obs if obs.renderer is not None else obs.match(scene.frame)
        window = (slice(None), *matched.renderer.window.slices)
        squares = matched.noise.weights * (matched.data - matched.render(scene)) ** 2
        total += float(squares[window][:, matched.renderer.inside].sum())
    return total


@functools.cache
def fitted() -> FitResult:
    """Return the fit of the default blend."""
    return fit_blend(observe())


@functools.cache
def fitted_shift(scale=1.0) -> FitResult:
    """Return the fit of a blend whose coarse image has an offset and a background, both free."""
    observations = observe(shift=DISPLACEMENT, background=BACKGROUND, scale=scale)
    return fit_blend(observations, free_coarse=True, scale=scale)


def dense_jacobian(problem, state):
    """Derivatives of all whitened residuals, as columns: vector coordinates, then pixels of all images."""
    vector, unravel = jax.flatten_util.ravel_pytree(state)
    forward = jax.jit(
        jax.linearize(lambda v: jax.flatten_util.ravel_pytree(problem.residuals(unravel(v)))[0], vector)[1]
    )
    return np.stack([np.asarray(forward(unit), float) for unit in jnp.eye(len(vector))], axis=-1)
