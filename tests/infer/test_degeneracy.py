"""What of a fit nothing determines: said by name, before the fit or with the errors. Covariances against dense linear algebra."""

import numpy as np
import numpyro.distributions as dist
import pytest

from scenefit.data.nuisances import Astrometry, Calibration
from scenefit.data.observation import Observation
from scenefit.infer.errors import parameter_covariance, parameter_errors
from scenefit.infer.fit import FitResult, Status, fit
from scenefit.infer.inverse import covariance_of, undetermined
from scenefit.model.morphology import GaussianMorphology, PixelMorphology, PointMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.model.spectrum import StaticSpectrum, TransientSpectrum
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF

SHAPE, CHANNELS = (26, 30), ("g", "r")
FRAME = Frame(SHAPE, channels=CHANNELS, padding=8)
PSFS, SIGMAS = {"sharp": GaussianPSF(1.1), "broad": GaussianPSF(1.8)}, {"sharp": 0.05, "broad": 0.02}
SCALE, SHIFT = "observations.{}.calibration.flux_scale", "observations.{}.astrometry.shift"
FLUX = "sources.{}.spectrum.flux"
SCALES = {"sharp": np.array([1.0, 1.0]), "broad": np.array([1.05, 0.97])}
PRIOR = 0.05


def scene_of(**sources):
    return Scene(FRAME, sources)


def star(center=(17.2, 20.4), flux=(20.0, 10.0)):
    return Source(center, flux, PointMorphology())


def galaxy(flux=(30.0, 40.0)):
    return Source((10.3, 12.1), flux, GaussianMorphology(2.5, (0.2, -0.1)))


def observe(**more):
    """Both observations, blank."""
    blank = np.zeros((len(CHANNELS), *SHAPE))
    return [
        Observation(blank, sigma=SIGMAS[name], psf=psf, channels=CHANNELS, name=name, **more)
        for name, psf in PSFS.items()
    ]


TRUTH = scene_of(galaxy=galaxy(), star=star())


def loosened(observations, scene=TRUTH, pattern="observations.*.calibration.flux_scale"):
    """Default parameters, but those that match free without a prior, as no step of a user's own could leave them."""
    parameters = Parameters.default(scene, observations)
    found = parameters.match(pattern)
    table = {path: p.replace(free=True, prior=None) if path in found else p for path, p in parameters.table.items()}
    return Parameters(table)


def photometry(parameters):
    """The parameters with all shapes and places fixed."""
    return parameters.fix("sources.*.center").fix("sources.*.morphology")


def templates(observations, scene):
    """Images of every source at unit flux, by observation, shape (source, channel, y, x)."""
    units = [Scene(FRAME, {n: Source(s.center, [1.0, 1.0], s.morphology)}) for n, s in scene.sources.items()]
    return {obs.name: np.array([obs.render(each) for each in units], float) for obs in observations}


def dense_covariance(observations, scene, scales, free_scales, with_prior=()):
    """Covariance of fluxes (source, channel), then of the scales named, by channel, from the images' own derivatives."""
    images, columns = templates(observations, scene), []
    fluxes = np.array([source.spectrum.flux for source in scene.sources.values()])
    for number, channel in np.ndindex(fluxes.shape):
        parts = []
        for name, image in images.items():
            part = np.zeros((2, *SHAPE))
            part[channel] = scales[name][channel] * image[number, channel] / SIGMAS[name]
            parts.append(part.ravel())
        columns.append(np.concatenate(parts))
    for free in free_scales:
        for channel in range(2):
            parts = {name: np.zeros((2, *SHAPE)) for name in images}
            parts[free][channel] = np.tensordot(fluxes[:, channel], images[free][:, channel], 1) / SIGMAS[free]
            columns.append(np.concatenate([part.ravel() for part in parts.values()]))
    matrix = np.array(columns) @ np.array(columns).T
    for number, free in enumerate(free_scales):
        place = fluxes.size + 2 * number + np.arange(2)
        matrix[place, place] += (free in with_prior) / PRIOR**2
    return np.linalg.inv(matrix)


def test_exchanges_change_no_data():
    """Why they are refused: all flux scales against all fluxes, all shifts against all centers."""
    factor, move = 1.3, np.array([0.7, -0.4])
    brighter = scene_of(galaxy=galaxy((30 * factor, 40 * factor)), star=star(flux=(20 * factor, 10 * factor)))
    moved = {n: Source(np.array(s.center) + move, s.spectrum.flux, s.morphology) for n, s in TRUTH.sources.items()}
    plain = observe()
    fainter, shifted = (
        observe(calibration=Calibration(1 / factor)),
        # The shift is along (x, y).
        observe(astrometry=Astrometry(shift=-move[::-1])),
    )
    for obs, dim, other in zip(plain, fainter, shifted, strict=True):
        image = obs.render(TRUTH)
        # 1e-5: rounding in float32. 1e-3: the stamps of profiles, which end where little light is left, move by whole pixels.
        np.testing.assert_allclose(dim.render(brighter), image, atol=1e-5 * image.max())
        np.testing.assert_allclose(other.render(Scene(FRAME, moved)), image, atol=1e-3 * image.max())


def test_all_flux_scales_free_raise_before_the_fit():
    observations = observe()
    parameters = Parameters.default(TRUTH, observations).free("observations.*.calibration.flux_scale")
    # By default they have priors.
    parameters.check_anchored(TRUTH, observations)
    parameters = parameters.prior("observations.*.calibration.flux_scale", None)
    message = (
        r"All observations' calibration\.flux_scale are free; nothing then says how bright the model is\. Keep at least"
    )
    with pytest.raises(ValueError, match=message) as raised:
        fit(TRUTH, observations, parameters, progress=False)
    for name in PSFS:
        assert SCALE.format(name) in str(raised.value)
    assert "give it a prior" in str(raised.value)


def test_all_families_are_named_at_once():
    """And only those: backgrounds, PSFs and noise of an observation are its own."""
    parameters = loosened(observe(), pattern="observations")
    assert all(p.free and p.prior is None for p in parameters if p.path.startswith("observations"))
    with pytest.raises(ValueError, match="nothing then says") as raised:
        fit(TRUTH, observe(), parameters, progress=False)
    lines = str(raised.value).splitlines()
    assert [line.partition(" are free")[0] for line in lines] == [
        f"All observations' {name}" for name in ("astrometry.shift", "astrometry.rotation", "calibration.flux_scale")
    ]
    for line in lines:
        assert "sharp" in line
        assert "broad" in line
    with pytest.raises(ValueError, match="how the model is turned") as early:
        Parameters.default(TRUTH, observe()).prior("observations.*.calibration", None).free("observations")
    assert str(early.value) == str(raised.value)


ANCHORS = {
    "fixed scale": lambda p: p.fix(SCALE.format("broad")),
    "prior of a scale": lambda p: p.prior(SCALE.format("sharp"), dist.Normal(1.0, PRIOR)),
    "fixed flux": lambda p: p.fix(FLUX.format("star")),
    "prior of a flux": lambda p: p.prior(FLUX.format("galaxy"), dist.LogNormal(3.0, 0.1)),
    "tied to a fixed one": lambda p: p.fix(SCALE.format("broad")).tie(SCALE.format("broad"), SCALE.format("sharp")),
}


@pytest.mark.parametrize("anchor", ANCHORS)
def test_anchors_of_the_brightness(anchor):
    observations = observe()
    loose = loosened(observations)
    ANCHORS[anchor](loose).check_anchored(TRUTH, observations)
    tied = loose.tie(SCALE.format("broad"), SCALE.format("sharp"))
    with pytest.raises(ValueError, match="how bright"):
        tied.check_anchored(TRUTH, observations)


PLACES = {
    "prior of a shift": lambda p: p.prior(SHIFT.format("broad"), dist.Normal(0.0, 0.5)),
    "fixed center": lambda p: p.fix("sources.star.center"),
    "prior of a center": lambda p: p.prior("sources.star.center", dist.Normal(15.0, 0.5)),
}


@pytest.mark.parametrize("anchor", PLACES)
def test_anchors_of_the_place(anchor):
    observations = observe()
    loose = loosened(observations, pattern="observations.*.astrometry.shift")
    with pytest.raises(ValueError, match="where the model lies"):
        loose.check_anchored(TRUTH, observations)
    PLACES[anchor](loose).check_anchored(TRUTH, observations)


def test_a_free_image_is_no_anchor():
    """Its center is fixed, but its pixels can move the light."""
    stamp = PixelMorphology(np.ones((5, 5)) / 25, (2, 2))
    scene = scene_of(clump=Source((12, 12), [3.0, 3.0], stamp), star=star())
    observations = observe()
    loose = loosened(observations, scene, "observations.*.astrometry.shift")
    with pytest.raises(ValueError, match="where the model lies"):
        loose.check_anchored(scene, observations)
    loose.fix("sources.clump.morphology.image").check_anchored(scene, observations)


def epochs(host):
    """A scene in two epochs of a band with a supernova in the second one, and an observation of each."""
    channels = (("g", 1), ("g", 2))
    frame = Frame(SHAPE, channels=channels, padding=8)
    spectra = StaticSpectrum([9.0], ["g"]) if host == "static" else TransientSpectrum([9.0, 0.0], epochs=[1])
    nova = Source((12, 12), TransientSpectrum([0.0, 4.0], epochs=[2]), PointMorphology())
    scene = Scene(frame, {"host": Source((10, 10), spectra, PointMorphology()), "nova": nova})
    observations = [
        Observation(np.zeros((1, *SHAPE)), sigma=1.0, psf=psf, channels=[channel], name=name)
        for (name, psf), channel in zip(PSFS.items(), channels, strict=True)
    ]
    return scene, observations


def test_an_anchor_holds_for_channels_in_common():
    """A scale that is fixed in one channel says something of another only through a source with one flux in both."""
    for host in ("static", "transient"):
        scene, observations = epochs(host)
        parameters = loosened(observations, scene, SCALE.format("broad"))
        if host == "static":
            parameters.check_anchored(scene, observations)
            parameters = loosened(observations, scene)
            with pytest.raises(ValueError, match="how bright") as raised:
                parameters.check_anchored(scene, observations)
            assert len(str(raised.value).splitlines()) == 1
        else:
            with pytest.raises(ValueError, match=r"are free in \[\('g', 2\)\]; nothing then says how bright") as raised:
                parameters.check_anchored(scene, observations)
            assert SCALE.format("sharp") not in str(raised.value)


@pytest.fixture(scope="module")
def noisy():
    """Both observations with noise, and with scales that they don't know of."""
    rng, result = np.random.default_rng(3), []
    for obs in observe():
        image = obs.render(TRUTH) * SCALES[obs.name][:, None, None]
        data = image + SIGMAS[obs.name] * rng.normal(size=image.shape)
        result.append(Observation(data, sigma=SIGMAS[obs.name], psf=obs.psf, channels=CHANNELS, name=obs.name))
    return result


@pytest.mark.parametrize("anchor", ["fixed", "prior"])
def test_covariance_of_an_anchored_fit_is_the_dense_one(noisy, anchor):
    parameters, free = photometry(loosened(noisy)), ["sharp", "broad"]
    if anchor == "fixed":
        parameters, free = parameters.fix(SCALE.format("sharp")), ["broad"]
    else:
        parameters = parameters.prior(SCALE.format("sharp"), dist.Normal(1.0, PRIOR))
    result = fit(TRUTH, noisy, parameters, progress=False, throw=True)
    found = parameter_covariance(result)
    scales = {obs.name: obs.calibration.flux_scale for obs in result.observations}
    expected = dense_covariance(noisy, result.scene, scales, free, ["sharp"])
    paths = [FLUX.format(name) for name in TRUTH.sources] + [SCALE.format(name) for name in free]
    rows = np.concatenate([found.places[path] for path in paths])
    sigma = np.sqrt(np.diag(expected))
    # 1e-3 of the errors: float32, in which this matrix has a condition number of some thousands.
    np.testing.assert_allclose(
        found.matrix[np.ix_(rows, rows)] / np.outer(sigma, sigma), expected / np.outer(sigma, sigma), atol=1e-3
    )
    # The truth is within what the errors say.
    for path, truth in ((FLUX.format("galaxy"), [30.0, 40.0]), (SCALE.format("broad"), SCALES["broad"])):
        value = scales["broad"] if path.startswith("observations") else result.scene.sources["galaxy"].spectrum.flux
        assert (np.abs(value - truth) < 4 * found.errors[path]).all()


def as_result(scene, observations, parameters):
    """The outcome of a fit that ends where it starts."""
    matched = tuple(obs.match(FRAME) for obs in observations)
    return FitResult(scene, matched, parameters, Status.CONVERGED, 0.0, {}, 0, {})


def test_blocks_and_names(noisy):
    parameters = photometry(loosened(noisy)).fix(SCALE.format("sharp"))
    covariance = parameter_covariance(as_result(TRUTH, noisy, parameters))
    errors = parameter_errors(as_result(TRUTH, noisy, parameters))
    host, point = FLUX.format("galaxy"), FLUX.format("star")
    assert covariance.names == [f"{path}[{entry}]" for path in covariance.places for entry in range(2)]
    assert set(covariance.places) == {host, point, SCALE.format("broad")} == set(errors)
    np.testing.assert_array_equal(covariance.matrix, covariance.matrix.T)
    np.testing.assert_array_equal(covariance[host, point], covariance[point, host].T)
    np.testing.assert_array_equal(errors[host], np.sqrt(np.diag(covariance[host])))
    # What is brighter in both images is known together; the channels share nothing.
    assert (np.diag(covariance[host, SCALE.format("broad")]) < 0).all()
    assert abs(covariance[host][0, 1]) < 1e-6 * errors[host].prod()
    with pytest.raises(KeyError, match=r"no free parameter \['sources.galaxy.center'\]"):
        covariance[host, "sources.galaxy.center"]


def blend(twin_center, faint_flux):
    """Two stars, a known galaxy, and another one of unknown shape; what is free."""
    faint = Source((18.6, 8.3), [faint_flux, faint_flux], GaussianMorphology(2.0, (0.0, 0.1)))
    twin = star(twin_center, (8.0, 6.0))
    scene = scene_of(galaxy=galaxy(), star=star(flux=(12.0, 4.0)), twin=twin, faint=faint)
    parameters = Parameters.default(scene, observe()).fix("sources.galaxy").free(FLUX.format("galaxy"))
    return scene, parameters.fix("sources.star.center").fix("sources.twin.center")


def test_what_nothing_determines_is_named_and_has_infinite_errors(noisy):
    """Two stars at one place share their flux, a source without light has no shape; the rest is as known as without them."""
    scene, parameters = blend(star().center, 0.0)
    with pytest.warns(UserWarning, match=r"Neither the data nor a prior determine sources\.") as caught:
        covariance = parameter_covariance(as_result(scene, noisy, parameters))
    (message,) = (str(each.message) for each in caught)
    named = (
        message.removeprefix("Neither the data nor a prior determine ").partition(". Their errors")[0].split("; nor ")
    )
    shape = [name for name in covariance.names if name.startswith(("sources.faint.center", "sources.faint.morphology"))]
    shared = [f"sources.star.spectrum.flux[{entry}], sources.twin.spectrum.flux[{entry}]" for entry in range(2)]
    assert sorted(named) == sorted(shape + shared)
    for path, error in covariance.errors.items():
        assert np.isinf(error).all() == (path not in (FLUX.format("galaxy"), FLUX.format("faint")))
    # As if the stars were one, and the shape that can't be seen were known.
    known = scene_of(galaxy=galaxy(), star=star(), faint=scene.sources["faint"])
    expected = dense_covariance(noisy, known, {name: np.ones(2) for name in PSFS}, [])
    rows = np.concatenate([covariance.places[FLUX.format(name)] for name in ("galaxy", "faint")])
    # 1e-4: rounding in float32.
    np.testing.assert_allclose(
        covariance.matrix[np.ix_(rows, rows)], expected[np.ix_([0, 1, 4, 5], [0, 1, 4, 5])], atol=1e-4 * expected.max()
    )
    assert not covariance[FLUX.format("galaxy"), FLUX.format("star")].any()


def test_no_warning_where_all_is_determined(noisy):
    """The same scene, its stars apart and its galaxies bright."""
    scene, parameters = blend((9.0, 23.0), 25.0)
    errors = parameter_errors(as_result(scene, noisy, parameters))
    assert all(np.isfinite(error).all() and (error > 0).all() for error in errors.values())


def test_sets_don_t_depend_on_the_choice_of_directions():
    """Of a space of lost directions any basis may come; its blocks are the same."""
    rng = np.random.default_rng(5)
    blocks = [np.array([1.0, -1.0]), np.array([2.0, 1.0, -0.5])]
    size = 2 + 3 + 4
    lost = np.zeros((2, size))
    lost[0, [1, 6]], lost[1, [0, 3, 8]] = blocks
    basis = np.linalg.qr(np.concatenate([lost, rng.normal(size=(size - 2, size))]).T)[0]
    # Unequal weights of the others mustn't link them, nor must scales of the coordinates.
    scale = 10.0 ** rng.uniform(-3, 3, size)
    matrix = (basis[:, 2:] * rng.uniform(1, 9, size - 2)) @ basis[:, 2:].T * scale * scale[:, None]
    found = sorted(members.tolist() for members in undetermined(matrix))
    expected = sorted(sorted(np.nonzero(row)[0].tolist()) for row in lost)
    assert found == expected
    variances = np.diag(covariance_of(matrix))
    assert np.isinf(variances).nonzero()[0].tolist() == np.nonzero(lost.any(axis=0))[0].tolist()
