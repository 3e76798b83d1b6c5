"""Fits of resampled images against fits of the images themselves: the same fluxes within what resampling loses."""

import numpy as np

import scenefit as sf
from tests.helpers import tangent_wcs

NATIVE, FINE, ROTATION, SIGMA = 0.17, 0.09, 23.0, 0.4
FLUXES = np.array([900.0, 500.0, 300.0])


def make_scene(frame):
    middle = (np.array(frame.shape[1:]) - 1) / 2
    shapes = sf.GaussianMorphology(3.5, (0.3, 0.1)), sf.GaussianMorphology(2.0, (-0.2, 0.2)), sf.PointMorphology()
    places = np.array([[-4.0, -5.5], [5.0, 2.0], [-3.0, 8.5]]) + middle
    return sf.Scene(frame, {n: sf.Source(p, [f], s) for n, p, f, s in zip("abc", places, FLUXES, shapes, strict=True)})


def test_fluxes_are_those_of_the_native_image():
    """Both see the same noise: fluxes differ by what is lost in resampling alone."""
    shape = (40, 40)
    wcs, target = tangent_wcs(shape, NATIVE), tangent_wcs((72, 72), FINE, rotation_deg=ROTATION)

    def observe(data):
        return sf.Observation(data, sigma=SIGMA, psf=sf.GaussianPSF(1.5), wcs=wcs, channels=["i"], name="ground")

    blank = observe(np.zeros(shape))
    frame = sf.Frame.from_observations([blank], pixel_scale=FINE)
    start = make_scene(frame)
    clean = blank.match(frame).render(start)[0]
    parameters = None
    differences, errors = [], []
    for seed in range(4):
        native = observe(clean + np.random.default_rng(seed).normal(0, SIGMA, shape))
        pair = native, sf.CorrelatedObservation.from_observation(native, target)
        if parameters is None:
            parameters = sf.Parameters.default(start, pair[:1]).fix("sources.*.center").fix("sources.*.morphology")
        tables = [
            sf.catalog(sf.fit(start, obs, parameters, progress=False), model_error=False, progress=False)
            for obs in pair
        ]
        fluxes = [np.asarray(table["flux_i"], float) for table in tables]
        differences.append(fluxes[1] - fluxes[0])
        errors.append([np.asarray(table["flux_err_i"], float) for table in tables])
    before, after = np.mean(errors, axis=0)
    # The image is turned within its edges and oversampled: hardly anything is lost.
    np.testing.assert_allclose(after, before, rtol=0.01)
    # Of 4 draws: interpolation between native pixels leaves a twentieth of the error.
    assert (np.std(differences, axis=0) < 0.1 * before).all()
    assert (np.abs(np.mean(differences, axis=0)) < 0.06 * before).all()
