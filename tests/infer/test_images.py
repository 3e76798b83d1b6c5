"""Fits of free images other than plain pixels: starlets, and images on top of smooth profiles."""

import functools

import numpy as np
import pytest
import scipy.optimize

from scenefit.app.serialization import load, save
from scenefit.infer.fit import fit
from scenefit.model.morphology import MultiGaussianMorphology, PixelMorphology, PointMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.model.starlet import StarletMorphology
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from scenefit.survey.catalog import catalog
from scenefit.survey.flags import Flag
from tests.helpers import gaussian_image, make_observation

galsim = pytest.importorskip("galsim")

SHAPE, PSF = (36, 36), 1.3
GALAXY, STAR = np.array([17.0, 15.0]), np.array([22.0, 23.0])
GALAXY_FLUX, STAR_FLUX = 3000.0, 400.0
SIGMA_ENVELOPE = 3.6


@functools.cache
def observed():
    """Noise-free galaxy (a disk with two knots) and star, drawn by GalSim, and an observation with unit noise."""
    disk = galsim.Exponential(half_light_radius=3.5, flux=0.8).shear(g1=0.15, g2=-0.2)
    knots = [galsim.Gaussian(sigma=0.4, flux=0.1).shift(*at) for at in ((4.3, 1.6), (-3.2, 3.1))]
    psf = galsim.Gaussian(sigma=PSF)
    planes = []
    for profile, flux, (y, x) in ((galsim.Sum([disk, *knots]), GALAXY_FLUX, GALAXY), (psf, STAR_FLUX, STAR)):
        seen = profile if profile is psf else galsim.Convolve(profile, psf)
        middle = (np.array(SHAPE) - 1) / 2
        seen = seen.withFlux(flux).shift(x - middle[1], y - middle[0])
        planes.append(seen.drawImage(nx=SHAPE[1], ny=SHAPE[0], scale=1.0, method="no_pixel").array.astype(float))
    data = sum(planes) + np.random.default_rng(8).normal(size=SHAPE)
    return planes, make_observation(SHAPE, data=data, psf=GaussianPSF(PSF), wcs=None)


def frame():
    return Frame(SHAPE, channels=("g",), padding=8)


def envelope():
    """A round Gaussian as wide as the galaxy on a stamp of 27 pixels."""
    return gaussian_image((27, 27), (13, 13), SIGMA_ENVELOPE)


@functools.cache
def fitted():
    """The galaxy as starlets and the star as a point."""
    guess = envelope()
    galaxy = Source(GALAXY, [2000.0], StarletMorphology.from_image(guess, envelope=guess))
    scene = Scene(frame(), {"galaxy": galaxy, "star": Source(STAR + 0.3, [300.0], PointMorphology())})
    return fit(scene, observed()[1], progress=False)


def test_starlets_solve_non_negative_least_squares():
    """Best coefficients of a noisy clumpy source seen by two cameras; SciPy solves for all 98, with their prior, at once."""
    shape, center, side, flux = (18, 18), (8, 9), 7, 400.0
    grid = Frame(shape, channels=("g",), padding=8)
    rng = np.random.default_rng(4)
    guess = gaussian_image((side, side), (3, 3), 1.4)
    start = StarletMorphology.from_image(guess, 2, envelope=guess)
    truth = np.where(rng.random((side, side)) < 0.6, guess * rng.uniform(0.2, 3, (side, side)), 0.0)
    cameras = [
        make_observation(shape, data=np.zeros((1, *shape)), psf=GaussianPSF(s), wcs=None, name=n).match(grid)
        for n, s in (("sharp", 1.1), ("blurred", 2.0))
    ]

    def seen(image):
        whole = np.zeros((1, *shape))
        whole[0, center[0] - 3 : center[0] + 4, center[1] - 3 : center[1] + 4] = flux * image
        return np.concatenate([camera.render(whole).ravel() for camera in cameras])

    units = np.eye(2 * side**2).reshape(-1, 2, side, side)
    design = np.array([seen(StarletMorphology(unit).image) for unit in units]).T
    data = seen(truth / truth.sum()) + rng.normal(size=len(design))
    observed = [
        make_observation(shape, data=plane.reshape(1, *shape), psf=camera.psf, wcs=None, name=camera.name)
        for plane, camera in zip(np.split(data, 2), cameras, strict=True)
    ]
    scene = Scene(grid, {"a": Source(center, [flux], start)})
    parameters = Parameters.default(scene, observed).fix("sources.a.spectrum.flux")
    result = fit(scene, observed, parameters, progress=False, rtol=1e-3, max_steps=400)
    prior = parameters["sources.a.morphology.coefficients"].prior
    loc, scale = np.asarray(prior.loc, float).ravel(), np.asarray(prior.scale, float).ravel()
    # Unit sum: an equation that counts 1e6 times as much as a pixel of data.
    rows = np.concatenate([design, np.diag(1 / scale), 1e6 * np.ones((1, len(units)))])
    solution = scipy.optimize.lsq_linear(
        rows, np.concatenate([data, loc / scale, [1e6]]), bounds=(0, np.inf), tol=1e-14
    )
    assert result.is_converged
    # As for pixels (test_solvers): half the squared distance of 1e-3 for 98 values, and sums of 648 residuals in float32.
    assert result.loss == pytest.approx(solution.cost, abs=5e-3)
    values = result.scene.sources["a"].morphology.coefficients.ravel()
    sigma = np.sqrt(np.diag(np.linalg.inv(rows.T @ rows)))
    # A tenth of a standard deviation: the cost is flat to second order, sqrt(2 * 5e-3).
    assert (np.abs(values - solution.x) < 0.1 * sigma).all()
    assert (solution.x < 1e-6).sum() > 3


def test_starlets_recover_a_galaxy_beside_a_star():
    result, (planes, obs) = fitted(), observed()
    assert result.is_converged
    star, galaxy = result.scene.sources["star"], result.scene.sources["galaxy"]
    # Of a star alone the flux would have an error of 2 sqrt(pi) PSF = 4.6, and the position one of sqrt(2) PSF 4.6 / 400 = 0.02
    # pixels; the galaxy's free light below it makes that several times as much.
    assert float(star.spectrum.flux[0]) == pytest.approx(STAR_FLUX, abs=25)
    np.testing.assert_allclose(star.center, STAR, atol=0.06)
    # The error of the sum over the stamp of 27 x 27 is 27; four of these.
    assert float(galaxy.spectrum.flux[0]) == pytest.approx(GALAXY_FLUX, abs=110)
    image = obs.match(result.scene.frame).render(result.scene.without("star"))[0]
    error = image - planes[0]
    bright = planes[0] > 1
    # Errors of a fit that used all pixels as they are would be 1; an image of PSF-sized elements keeps
    # 1 / (2 PSF sqrt(pi)) = 0.22 of it, and splines of the size of the PSF somewhat more.
    assert np.sqrt(np.mean(error[bright] ** 2)) < 0.5
    assert np.abs(error).max() < 3
    # 1296 pixels: the scatter of their mean square is 0.04; a hundred or so numbers are fitted.
    assert 0.8 < np.mean((obs.data - obs.match(result.scene.frame).render(result.scene)) ** 2) < 1.05


def test_fitted_starlets_can_be_saved_and_measured(tmp_path):
    result = fitted()
    save(tmp_path / "fit.asdf", result)
    loaded = load(tmp_path / "fit.asdf")
    morphology, again = (r.scene.sources["galaxy"].morphology for r in (result, loaded))
    np.testing.assert_array_equal(again.coefficients, morphology.coefficients)
    np.testing.assert_array_equal(again.image, morphology.image)
    row = catalog(loaded)[0]
    # Half the light of the disk lies within 3.5 pixels; the knots are further out, and the stamp ends.
    assert 2.8 < row["half_light_radius"].value < 4.5
    assert not row["flags"] & Flag.AT_BOUND


def test_a_stamp_of_starlets_grows():
    guess = gaussian_image((11, 11), (5, 5), SIGMA_ENVELOPE)
    galaxy = Source(GALAXY, [2000.0], StarletMorphology.from_image(guess, envelope=guess))
    scene = Scene(frame(), {"galaxy": galaxy, "star": Source(STAR, [400.0], PointMorphology())})
    result = fit(scene, observed()[1], progress=False)
    grown = result.scene.sources["galaxy"].morphology
    assert result.is_converged
    assert grown.coefficients.shape == grown.envelope.shape
    assert grown.coefficients.shape == result.parameters["sources.galaxy.morphology.coefficients"].shape
    assert min(grown.coefficients.shape[1:]) >= 15


@pytest.mark.parametrize("kind", ["pixels", "starlets"])
def test_an_image_on_top_of_a_smooth_profile(kind):
    """Rings take the smooth light; what they can't describe, knots, goes into the image."""
    _, obs = observed()
    rings = MultiGaussianMorphology.log_spaced(1.0, 8.0, 4)
    guess = envelope()
    if kind == "pixels":
        extra = PixelMorphology(guess, envelope=guess)
    else:
        extra = StarletMorphology.from_image(guess, envelope=guess)
    host = CompositeSource({"smooth": Source(GALAXY, [1800.0], rings), "rest": Source(GALAXY, [200.0], extra)})
    scene = Scene(frame(), {"galaxy": host, "star": Source(STAR, [400.0], PointMorphology())})
    result = fit(scene, obs, progress=False)
    assert result.is_converged
    residual = obs.data - obs.match(result.scene.frame).render(result.scene)
    # As above: 0.04 is the scatter. The knots, of peaks of 28, leave a smooth model at more than twice the noise.
    assert 0.8 < np.mean(residual**2) < 1.1
    parts = result.scene.sources["galaxy"].parts
    total = sum(float(part.spectrum.flux[0]) for part in parts.values())
    # 6 %: light that non-negative values take from the noise, and four times the error of a sum over 27 x 27 pixels, 110.
    assert total == pytest.approx(GALAXY_FLUX, rel=0.06)
    # Knots, of a tenth of the flux each at offsets (1.6, 4.3) and (3.1, -3.2), stand out against the mirrored places. The prior
    # is smooth, but leaves more than half of their light within 3 x 3 pixels.
    image = extra.with_values(parts["rest"].morphology.values).evaluate(None, None, None)
    image = float(parts["rest"].spectrum.flux[0]) * np.asarray(image)
    for y, x in ((15, 17), (16, 10)):
        excess = image[y - 1 : y + 2, x - 1 : x + 2].sum() - image[25 - y : 28 - y, 25 - x : 28 - x].sum()
        assert 0.05 * GALAXY_FLUX < excess < 0.1 * GALAXY_FLUX
