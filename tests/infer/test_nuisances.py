"""Parameters of observations: how an image sees the scene."""

import jax
import numpy as np
import numpyro.distributions as dist
import pytest

from scenefit.app.serialization import load, save
from scenefit.data.noise import StudentTNoise
from scenefit.data.observation import Calibration, Observation
from scenefit.infer.errors import parameter_errors
from scenefit.infer.fit import fit
from scenefit.infer.sample import sample
from scenefit.model.morphology import PointMorphology, SersicMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from tests.helpers import tangent_header

SHAPE, SIGMA, EXTRA, SCALE = (40, 44), 0.02, 0.5, 1.07
FRAME = Frame(SHAPE, channels=("g",), padding=10)
VARIANCE, FLUX_SCALE = "observations.blurred.calibration.psf_variance", "observations.blurred.calibration.flux_scale"


def true_scene():
    galaxy = Source((18.3, 15.1), [30.0], SersicMorphology(2.5, 1.4, (0.2, -0.1)))
    return Scene(FRAME, {"galaxy": galaxy, "star": Source((25.2, 31.4), [20.0], PointMorphology())})


def observe(name, sigma, rng=None, data=None, **more):
    """An observation of the scene through a round Gaussian of the given width."""
    psf = GaussianPSF(sigma)
    if data is None:
        blank = Observation(np.zeros(SHAPE), sigma=SIGMA, psf=psf, channels=["g"], name=name)
        data = blank.render(true_scene())[0]
        data = data if rng is None else data + SIGMA * rng.normal(size=SHAPE)
    return Observation(data, sigma=SIGMA, psf=psf, channels=["g"], name=name, **more)


@pytest.fixture(scope="module")
def blurred():
    """A sharp image, and one whose PSF is broader than its user knows, and its fluxes larger."""
    rng = np.random.default_rng(8)
    sharp = observe("sharp", 1.1, rng)
    true = observe("blurred", np.sqrt(1.5**2 + EXTRA)).data[0]
    scaled = SCALE * true + SIGMA * rng.normal(size=SHAPE)
    return [sharp, observe("blurred", 1.5, data=scaled)]


def fitted(observations):
    scene = true_scene()
    parameters = Parameters.default(scene, observations)
    parameters = parameters.free(VARIANCE, prior=dist.Normal(0.0, 2.0)).free(FLUX_SCALE, prior=dist.Normal(1.0, 0.5))
    return fit(scene, observations, parameters, progress=False, throw=True)


GRIDS = {"same": (0.2, 0), "coarser": (0.5, 0), "rotated": (0.5, 20)}


@pytest.mark.parametrize("grid", GRIDS)
def test_psf_variance_is_that_of_a_broader_psf(grid):
    """On all routes from the model to pixels, in the observation's own pixels."""
    scale, rotation = GRIDS[grid]
    frame = Frame((60, 60), channels=("g",), wcs=tangent_header((60, 60), 0.2, rotation_deg=0), padding=20)
    scene = Scene(frame, [Source((28.3, 31.2), [10.0], PointMorphology())])
    wcs = tangent_header((24, 24), scale, rotation_deg=rotation)
    images = [
        Observation(
            np.zeros((24, 24)), sigma=1.0, psf=GaussianPSF(psf), wcs=wcs, channels=["g"], calibration=calibration
        ).render(scene)
        for psf, calibration in ((1.3, Calibration(psf_variance=0.4)), (np.sqrt(1.3**2 + 0.4), None))
    ]
    # 2e-4: narrower PSFs are cut off at a lower frequency, where they are down by 1e-4.
    np.testing.assert_allclose(images[0], images[1], atol=2e-4 * images[1].max())


def test_width_and_scale_are_recovered(blurred):
    result = fitted(blurred)
    errors = parameter_errors(result)
    found = result.observations[1].calibration
    assert errors[VARIANCE][0] < 0.1
    # The sharp image has the fluxes; the scale is as good as the photometry of both.
    assert errors[FLUX_SCALE][0] < 0.03
    assert abs(found.psf_variance[0] - EXTRA) < 3 * errors[VARIANCE][0]
    assert abs(found.flux_scale[0] - SCALE) < 3 * errors[FLUX_SCALE][0]
    flux = result.scene.sources["galaxy"].spectrum.flux[0]
    assert abs(flux - 30.0) < 3 * errors["sources.galaxy.spectrum.flux"][0]
    # Without them the fit is visibly bad: half the chi-square of the difference is in the thousands.
    plain = fit(true_scene(), blurred, progress=False)
    assert plain.loss > result.loss + 50


def test_draws_leave_a_wide_prior(blurred):
    result = fitted(blurred)
    posterior = sample(result, "laplace", key=jax.random.key(2), progress=False)
    errors = parameter_errors(result)
    for path, truth in ((VARIANCE, EXTRA), (FLUX_SCALE, SCALE)):
        draws = posterior[path][:, 0]
        # 0.1: both are the normal approximation, one by the exact Hessian.
        assert draws.std() == pytest.approx(errors[path][0], rel=0.1)
        assert abs(draws.mean() - truth) < 3 * draws.std()
    moved = posterior.model(0)[1][1]
    np.testing.assert_allclose(moved.calibration.psf_variance, posterior[VARIANCE][0])


def test_saved_and_loaded(tmp_path, blurred):
    obs = observe("one", 1.2, calibration=Calibration(1.1, 0.2))
    save(tmp_path / "obs.asdf", obs)
    loaded = load(tmp_path / "obs.asdf")
    np.testing.assert_array_equal(loaded.calibration.flux_scale, [1.1])
    np.testing.assert_array_equal(loaded.calibration.psf_variance, [0.2])


def test_parameters_of_older_files_lack_calibrations(blurred):
    scene = true_scene()
    parameters = Parameters.default(scene, blurred)
    old = {path: parameter for path, parameter in parameters.table.items() if "calibration" not in path}
    first, second = (
        fit(scene, blurred, each, max_steps=3, progress=False)
        for each in (parameters, Parameters(old, parameters.pixel_scale))
    )
    assert first.loss == second.loss


BAD = {
    "scale": ({"flux_scale": 0.0}, "finite, positive flux scales"),
    "variance": ({"psf_variance": np.nan}, "finite PSF variances in pixels squared"),
    "channels": ({"flux_scale": [1.0, 2.0]}, r"flux_scale wants one finite number or one per channel \(1\)"),
    "too sharp": ({"psf_variance": -1.5}, "takes away all of the PSF"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calibrations(case):
    given, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        observe("one", 1.2, calibration=Calibration(**given))


def test_errors_with_wide_wings_are_of_the_fisher_information():
    """Of a flux: per pixel, Student's t of scale s has the information (nu + 1) / ((nu + 3) s^2)."""
    scene = Scene(FRAME, {"star": Source((25.2, 31.4), [20.0], PointMorphology())})
    nu, psf = 5.0, GaussianPSF(1.5)
    noise = StudentTNoise(np.full((1, *SHAPE), SIGMA**-2), nu)
    blank = Observation(np.zeros(SHAPE), noise=noise, psf=psf, channels=["g"], name="one")
    template = blank.render(scene)[0] / 20.0
    scale = SIGMA * np.sqrt((nu - 2) / nu)
    data = 20.0 * template + scale * np.random.default_rng(1).standard_t(nu, SHAPE)
    obs = Observation(data, noise=noise, psf=psf, channels=["g"], name="one")
    result = fit(scene, obs, Parameters.default(scene, [obs]).fix("sources.star.center"), progress=False)
    error = parameter_errors(result)["sources.star.spectrum.flux"][0]
    expected = scale * np.sqrt((nu + 3) / (nu + 1) / (template**2).sum())
    # 1e-4: rounding in float32.
    assert error == pytest.approx(expected, rel=1e-4)
