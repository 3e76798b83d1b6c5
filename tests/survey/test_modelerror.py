import numpy as np
import pytest

import scenefit as sf
from scenefit.survey.footprint import measure_footprints
from scenefit.survey.modelerror import MOST_DROWNED, OTHERS_LIGHT, OWN_LIGHT, flux_model_errors
from tests.helpers import tangent_wcs

SIZE = 48
SOURCES = {
    "bright": sf.Source((22.0, 20.0), [900.0, 600.0], sf.GaussianMorphology(3.0)),
    "faint": sf.Source((26.0, 24.0), [90.0, 120.0], sf.GaussianMorphology(2.0)),
    "star": sf.Source((24.0, 22.0), [300.0, 300.0], sf.PointMorphology()),
    "alone": sf.Source((8.0, 40.0), [200.0, 200.0], sf.GaussianMorphology(1.5)),
}


@pytest.fixture(scope="module")
def result():
    obs = sf.Observation(
        np.zeros((2, SIZE, SIZE)),
        weights=1.0,
        psf=sf.GaussianPSF(1.5),
        wcs=tangent_wcs((SIZE, SIZE)),
        channels=("g", "r"),
        name="a",
        zeropoint=31.4,
    )
    scene = sf.Scene(sf.Frame.from_observations([obs]), SOURCES)
    obs = obs.match(scene.frame)
    parameters = sf.Parameters.default(scene, [obs]).fix("sources.bright")
    return sf.FitResult(scene, (obs,), parameters, sf.Status.CONVERGED, 0.0, {}, 0, {})


def test_of_oneself_and_of_others(result):
    """Images of each source alone say how much light of others lies over its own."""
    (obs,), scene = result.observations, result.scene
    alone = {name: obs.render(scene.evaluate([name])) for name in SOURCES}
    total = sum(alone.values())
    flux = np.array([[900.0, 600.0], [90.0, 120.0], [300.0, 300.0], [200.0, 200.0]])
    footprints = measure_footprints(scene, [obs], scene.stamps())
    found = flux_model_errors(scene, flux, footprints.blendedness)
    for n, (name, image) in enumerate(alone.items()):
        if name == "star":
            np.testing.assert_array_equal(found[n], 0)
            continue
        others = (image * (total - image)).sum(axis=(1, 2)) / (image**2).sum(axis=(1, 2))
        expected = flux[n] * np.sqrt(OWN_LIGHT**2 + (OTHERS_LIGHT * others) ** 2)
        # 0.5 %: both images are of float32, and the overlap a small difference for the bright source.
        np.testing.assert_allclose(found[n], expected, rtol=5e-3)
    assert found[1, 0] / 90 > 5 * OWN_LIGHT
    np.testing.assert_allclose(found[3], 200 * OWN_LIGHT, rtol=1e-3)


def test_what_is_not_known_of_others(result):
    flux = np.array([[-900.0, 600.0]] + [[1.0, 1.0]] * 3)
    drowned = np.array([[np.nan, 1.0]] + [[0.0, 0.0]] * 3)
    found = flux_model_errors(result.scene, flux, drowned)
    most = OTHERS_LIGHT * MOST_DROWNED / (1 - MOST_DROWNED)
    np.testing.assert_allclose(found[0], [900 * OWN_LIGHT, 600 * np.hypot(OWN_LIGHT, most)], rtol=1e-12)
    assert flux_model_errors(sf.Scene(result.scene.frame, {}), np.zeros((0, 2)), np.zeros((0, 2))).shape == (0, 2)


def test_errors_of_the_catalogue_have_them_unless_told(result):
    full, bare = (sf.catalog(result, model_error=each, progress=False) for each in (True, False))
    measured = measure_footprints(result.scene, result.observations, result.scene.stamps())
    flux = np.stack([full["flux_g"].value, full["flux_r"].value], axis=-1)
    expected = flux_model_errors(result.scene, flux, measured.blendedness)
    for number, channel in enumerate("gr"):
        own, less = full[f"flux_err_{channel}"].value, bare[f"flux_err_{channel}"].value
        added = np.sqrt(own**2 - less**2)
        np.testing.assert_allclose(added[1:], expected[1:, number], rtol=1e-6, atol=1e-9)
        # Held fixed, it is taken as known.
        assert own[0] == less[0] == 0
        np.testing.assert_allclose(full[f"mag_err_{channel}"][1:].value, 2.5 / np.log(10) * own[1:] / flux[1:, number])
    for name in ("snr", "ra_err", "half_light_radius_err", "flux_correlation", "flags"):
        np.testing.assert_array_equal(full[name], bare[name])


def test_channels_of_a_source_have_them_in_common(result):
    """Colors are as certain as before, and neighbours no more alike."""
    full, bare = (sf.catalog_covariance(result, model_error=each, progress=False) for each in (True, False))
    table = sf.catalog(result, progress=False)
    names = [("faint", "flux_g"), ("faint", "flux_r")]
    own = [full[name, name] - bare[name, name] for name in names]
    shared = full[names[0], names[1]] - bare[names[0], names[1]]
    assert shared == pytest.approx(np.sqrt(own[0] * own[1]))
    assert full[names[0], names[0]] == pytest.approx(table["flux_err_g"][1].value ** 2)
    other = ("alone", "flux_g")
    assert full[names[0], other] == bare[names[0], other]
