import numpy as np
import pytest

from scenefit.data.observation import Observation
from scenefit.infer.batch import fit_many
from scenefit.infer.fit import Status, fit
from scenefit.model.morphology import GaussianMorphology, PixelMorphology, SersicMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF

FRAME, PSF = Frame((25, 27), channels="g", padding=8), GaussianPSF(1.4)
TRUTH = [(20.0, 2.0, 1.0, (0.2, 0.1)), (10.0, 3.0, 2.5, (0.0, -0.4)), (30.0, 1.5, 0.7, (0.1, 0.0))]
SIGMA = 0.01


def truth(number):
    flux, radius, index, ellipticity = TRUTH[number]
    return Scene(FRAME, [Source((12.3, 13.1), [flux], SersicMorphology(radius, index, ellipticity))])


def observe(number, noise=SIGMA):
    blank = Observation(np.zeros(FRAME.box.shape), sigma=SIGMA, psf=PSF, channels="g", name="stamp")
    draw = np.random.default_rng(number).normal(size=FRAME.box.shape)
    data = blank.match(FRAME).render(truth(number))[0] + noise * draw
    return Observation(data, sigma=SIGMA, psf=PSF, channels="g", name="stamp")


CLEAN = [observe(number, noise=0.0) for number in range(3)]


def start(number):
    return Scene(FRAME, [Source((12.0, 13.0), [TRUTH[number][0] / 2], SersicMorphology(2.0, 1.5))])


@pytest.fixture(scope="module")
def together():
    """All three, as five scenes in batches of two."""
    numbers = [0, 1, 2, 1, 0]
    return fit_many([start(n) for n in numbers], [observe(n) for n in numbers], batch_size=2, progress=False)


def test_every_scene_ends_where_it_does_alone(together):
    for number, result in zip([0, 1, 2, 1, 0], together, strict=True):
        alone = fit(start(number), observe(number), progress=False)
        assert result.status is Status.CONVERGED
        assert alone.status is Status.CONVERGED
        # 0.01: the squared tolerance of both times the number of parameters; 1e-6: rounding of the loss.
        assert result.loss == pytest.approx(alone.loss, abs=0.01, rel=1e-6)
        one, other = (r.scene.sources["0"] for r in (result, alone))
        # 0.05 standard errors: the tolerance of both fits, 0.02, along the worst direction.
        assert one.spectrum.flux[0] == pytest.approx(other.spectrum.flux[0], rel=2e-3)
        assert float(one.morphology.sersic_index) == pytest.approx(float(other.morphology.sersic_index), rel=5e-3)


def test_noise_free_stamps_give_back_the_truth():
    for number, result in enumerate(fit_many([start(n) for n in range(3)], CLEAN, progress=False)):
        flux, radius, index, _ = TRUTH[number]
        source = result.scene.sources["0"]
        # 3e-3: the tolerance of the fit, 0.02 standard errors of up to 10 %.
        assert source.spectrum.flux[0] == pytest.approx(flux, rel=3e-3)
        assert float(source.morphology.half_light_radius) == pytest.approx(radius, rel=3e-3)
        assert float(source.morphology.sersic_index) == pytest.approx(index, rel=3e-3)


def test_scenes_that_repeat_give_the_same(together):
    assert together[0].loss == together[4].loss
    assert together[1].loss == together[3].loss


def test_a_scene_that_fails_does_not_stop_the_others():
    # Its square is beyond the range of float32.
    bad = Scene(FRAME, [Source((12.0, 13.0), [1e25], SersicMorphology(2.0, 1.5))])
    results = fit_many([bad, start(1)], [observe(0), observe(1)], progress=False)
    assert results[0].status is Status.FAILED
    assert results[1].status is Status.CONVERGED
    assert results[0].scene.sources["0"].spectrum.flux[0] == 1e25


def test_scenes_of_different_structure():
    small = Frame((21, 21), channels="g", padding=8)
    blank = Observation(np.zeros((21, 21)), sigma=SIGMA, psf=PSF, channels="g", name="small").match(small)
    model = Scene(small, [Source((10.0, 10.2), [5.0], GaussianMorphology(2.0))])
    obs = Observation(blank.render(model)[0], sigma=SIGMA, psf=PSF, channels="g", name="small")
    first = Scene(small, [Source((10.5, 10.0), [3.0], GaussianMorphology(1.5))])
    fixed = Parameters.default(first, [obs]).fix("sources.0.center")
    parameters = [Parameters.default(start(0), [observe(0)]), Parameters.default(first, [obs]), fixed]
    results = fit_many([start(0), first, first], [observe(0), obs, obs], parameters, progress=False)
    assert [result.status for result in results] == [Status.CONVERGED] * 3
    np.testing.assert_array_equal(results[2].scene.sources["0"].center, (10.5, 10.0))
    # 1e-3: hundredths of the standard error.
    assert results[1].scene.sources["0"].spectrum.flux[0] == pytest.approx(5.0, rel=1e-3)


def test_too_few_steps():
    (result,) = fit_many([start(1)], [observe(1)], max_steps=2, progress=False)
    assert result.status is Status.MAX_STEPS
    assert result.num_steps == 2


def test_more_scenes_of_one_structure_compile_nothing(compilations):
    numbers = [0, 1]
    fit_many([start(n) for n in numbers], [observe(n) for n in numbers], batch_size=2, progress=False)
    compilations.clear()
    fit_many([start(n) for n in (2, 1, 0, 1)], [observe(n) for n in (2, 1, 0, 1)], batch_size=2, progress=False)
    assert compilations == []


def test_bad_input():
    with pytest.raises(ValueError, match=r"as many observations \(and parameters\) as scenes; got \[1, 2\]"):
        fit_many([start(0)], [observe(0), observe(1)], progress=False)
    pixels = Scene(FRAME, [Source((12.0, 13.0), [1.0], PixelMorphology(np.ones((5, 5))))])
    with pytest.raises(ValueError, match="Scene 0: fit_many wants 1 to 1000 free numbers and no free image"):
        fit_many([pixels], [observe(0)], progress=False)
    assert fit_many([], [], progress=False) == []
