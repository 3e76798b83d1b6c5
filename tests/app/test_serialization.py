import enum
import warnings

import asdf
import astropy.units as u
import equinox as eqx
import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from astropy.io import fits
from astropy.wcs import WCS, DistortionLookupTable
from numpyro.distributions import constraints
from numpyro.distributions.transforms import ExpTransform

from scenefit.app import serialization
from scenefit.app.serialization import atomic_path, load, save
from scenefit.arrays.box import Box
from scenefit.data.correlated import CorrelatedNoise
from scenefit.data.correlation import PropagatedCorrelation, StationaryCorrelation
from scenefit.data.noise import FloorNoise, PoissonNoise, StudentTNoise, WhiteNoise
from scenefit.data.observation import Astrometry, Calibration, Observation
from scenefit.infer.diagnostics import Diagnostics, PosteriorStatus
from scenefit.infer.fit import FitResult, Status, fit
from scenefit.infer.sample import Posterior
from scenefit.model import link
from scenefit.model.clumpy import ClumpyMorphology
from scenefit.model.morphology import (
    DeVaucouleursMorphology,
    ExponentialMorphology,
    GaussianMorphology,
    MultiGaussianMorphology,
    PixelMorphology,
    PointMorphology,
    SersicMorphology,
)
from scenefit.model.parameters import Parameter, Parameters, unit_disk
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.model.spectrum import ArraySpectrum, StaticSpectrum, TransientSpectrum
from scenefit.model.starlet import StarletMorphology
from scenefit.sky.frame import Frame
from scenefit.sky.mixture import GaussianMixturePSF
from scenefit.sky.psf import GaussianPSF, ImagePSF
from scenefit.sky.resampledpsf import ResampledPSF

RNG = np.random.default_rng(3)
PRIORS = [
    dist.Normal(0, 30),
    dist.Normal(np.zeros(2), np.array([1.0, 2.0])),
    dist.TruncatedNormal(1.5, 1.0, low=0.3, high=8),
    dist.TruncatedNormal(1.5, 1.0, low=0.3),
    dist.TruncatedCauchy(1.5, 1.0, high=8.0),
    dist.Uniform(0.1, 2.0),
    dist.LogNormal(0.3, 1.2),
    dist.HalfNormal(3.0),
    dist.Beta(2.0, 3.0),
    dist.Gamma(2.0, 3.0),
    dist.StudentT(3.0, 0.0, 1.0),
    dist.MultivariateNormal(np.zeros(2), np.array([[2.0, 0.3], [0.3, 1.0]])),
    dist.Normal(0, 1).expand([2]).to_event(1),
]
CONSTRAINTS = [
    constraints.real,
    constraints.positive,
    constraints.nonnegative,
    constraints.unit_interval,
    constraints.interval(0.3, 8.0),
    constraints.greater_than(1.5),
    constraints.real_vector,
    constraints.independent(constraints.positive, 1),
    unit_disk,
]


def header(**cards) -> fits.Header:
    # Numbers of 17 digits, more than a FITS card holds.
    third = 1e-5 / 3
    common = {"CRVAL1": 150.1 + third, "CRVAL2": 2.2 - third, "CRPIX1": 9.1 + third, "CRPIX2": 8 - third}
    common |= {
        "CTYPE1": "RA---TAN",
        "CTYPE2": "DEC--TAN",
        "CUNIT1": "deg",
        "CUNIT2": "deg",
        "RADESYS": "ICRS",
    }
    return fits.Header({**common, **cards})


CD = {"CD1_1": -1e-5 / 3, "CD1_2": 1e-6 / 7, "CD2_1": 1e-6 / 9, "CD2_2": 1e-5 / 3}
PC = {"PC1_1": 0.9 / 7, "PC1_2": 0.1, "PC2_1": -0.1, "PC2_2": 0.7 / 3, "CDELT1": -1e-5 / 3, "CDELT2": 1e-5}
HEADERS = {
    "CD": header(**CD, RADESYS="FK5", EQUINOX=2000.0),
    "PC": header(**PC, LONPOLE=170.0 + 1e-10 / 3),
    "CROTA": header(CDELT1=-1e-5 / 3, CDELT2=1e-5, CROTA2=100 / 3),
    "latitude first": header(**CD, CTYPE1="DEC--TAN", CTYPE2="RA---TAN", CRVAL1=2.2, CRVAL2=150.1),
    "SIP": header(
        **CD,
        **{"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "B_ORDER": 2},
        **{"A_2_0": 1e-4 / 3, "B_1_1": 2e-4 / 3, "B_0_2": 1e-5},
    ),
    "TPV": header(**CD, CTYPE1="RA---TPV", CTYPE2="DEC--TPV", PV1_1=1.001, PV1_4=2.0, PV2_1=0.999, PV2_5=1.5),
    "ZPN": header(**CD, CTYPE1="RA---ZPN", CTYPE2="DEC--ZPN", PV2_1=1.0, PV2_3=42.0 + 1e-9 / 3),
}


def make_wcs(kind="CD") -> WCS:
    wcs = WCS(HEADERS[kind])
    wcs.array_shape = (16, 18)
    return wcs


def make_observation(kind="CD", name="HSC", **options) -> Observation:
    data = RNG.normal(size=(2, 16, 18))
    data[0, 3, 4] = np.nan
    weights = RNG.uniform(1, 2, size=data.shape)
    options = {"zeropoint": [27.0, 26.5]} | ({} if "noise" in options else {"weights": weights}) | options
    y, x = np.mgrid[:15, :14]
    psf = np.stack([np.exp(-((y - 7) ** 2 + (x - 6.4) ** 2) / 8), np.exp(-((y - 7) ** 2 + (x - 6.3) ** 2) / 9)])
    return Observation(
        data,
        psf=ImagePSF(psf, center="centroid"),
        wcs=make_wcs(kind),
        channels=["g", ("r", 3)],
        name=name,
        background=[0.1, 0.2],
        background_slope=[(1e-3, -2e-3), (1e-3 / 3, 0.0)],
        astrometry=Astrometry([0.01, -0.02]),
        **options,
    )


def make_scene() -> Scene:
    frame = Frame((16, 18), channels=["g", ("r", 3)], wcs=make_wcs(), psf=GaussianPSF(0.8), padding=9, margin=3)
    parts = {
        "bulge": Source([5.5, 6.25], ArraySpectrum([1.0, 3.0]), GaussianMorphology(2.1, [0.1, 0.2])),
        "arms": Source([5.5, 6.25], [2.0, 1.0], PixelMorphology(RNG.uniform(size=(7, 9)), anchor=(3, 3))),
    }
    # The order of names is not that of the alphabet: it must survive.
    return Scene(frame, {"z": CompositeSource(parts), "a": Source([9.0, 9.0], [1.0, 2.0], PointMorphology())})


def make_parameters() -> Parameters:
    obs = [make_observation(name="HSC"), make_observation(name="HST")]
    table = (
        Parameters.default(make_scene(), obs)
        .fix("sources.a.center")
        .free("observations.HSC.astrometry.shift", prior=dist.Normal(0, 30 * u.mas))
        .prior("sources.*.half_light_radius", dist.TruncatedNormal(1.5, 1.0, low=0.3, high=8))
        .constrain("sources.a.spectrum.flux", constraints.interval(0.0, 5.0))
        .tie("sources.z.parts.bulge.center", "sources.z.parts.arms.center")
    )
    return table


def make_result() -> FitResult:
    observations = (make_observation(name="HSC"), make_observation(name="HST"))
    history = {"step": np.arange(3), "loss": np.array([3.0, 2.0, np.nan]), "gradient": RNG.uniform(size=100)}
    timing = {"compile": 1 / 3, "solve": np.inf}
    return FitResult(make_scene(), observations, make_parameters(), Status.CONVERGED, 1 / 3, history, 7, timing)


WAVELENGTHS = {"g": 0.4747, "r": 0.62, "i": 0.77}


def make_posterior() -> Posterior:
    """Draws of a parameter of a fit."""
    return Posterior(
        draws={"sources.a.center": RNG.normal(size=(2, 5, 2))},
        log_density=RNG.normal(size=(2, 5)),
        method="nuts",
        status=PosteriorStatus.NOT_MIXED,
        message="too short",
        diagnostics=Diagnostics({"sources.a.center": np.ones(2)}, {"sources.a.center": np.full(2, 9.0)}, 0.5, 0.0),
        result=make_result(),
        timing={"draws": 1 / 3},
    )


CORRELATION = np.array(
    [[[0.1, 0.25, 0.1], [0.3, 1.0, 0.3], [0.1, 0.25, 0.1]], [[0, 0.1, 0], [1 / 3, 1, 1 / 3], [0, 0.1, 0]]]
)
EXAMPLES = {
    "Box": Box((3, 4), (-1, 2)),
    "GaussianPSF": GaussianPSF([1.1, 1.3], integrate_pixel=True),
    "ImagePSF": ImagePSF(RNG.uniform(0.5, 1, size=(2, 8, 7)), center="centroid", oversampling=1.5),
    "ResampledPSF": ResampledPSF(
        ImagePSF(RNG.uniform(0.5, 1, size=(2, 8, 7)), center="centroid"), [[1 / 3, 2.0], [-2.0, 0.1]], 5
    ),
    "Frame": make_scene().frame,
    "WhiteNoise": WhiteNoise(RNG.uniform(0, 1, size=(2, 3, 4))),
    "StudentTNoise": StudentTNoise(RNG.uniform(0, 1, size=(2, 3, 4)), 10 / 3),
    "FloorNoise": FloorNoise(RNG.uniform(0, 1, size=(2, 3, 4)), [1 / 3, 2.0]),
    "PoissonNoise": PoissonNoise(
        np.where(RNG.random((2, 3, 4)) < 0.1, np.nan, RNG.poisson(3.0, (2, 3, 4))), [1 / 3, 2]
    ),
    "StationaryCorrelation": StationaryCorrelation(CORRELATION),
    "PropagatedCorrelation": PropagatedCorrelation(
        RNG.integers(0, 20, (12, 3)), RNG.uniform(0.5, 1, (2, 12, 3)), (3, 4), step=2
    ),
    "CorrelatedNoise": CorrelatedNoise(RNG.uniform(0, 1, size=(2, 7, 6)), CORRELATION),
    "Astrometry": Astrometry([0.1, -0.2], 1 / 3),
    "Calibration": Calibration([1.1, 1 / 3], [0.2, -0.1]),
    "Observation": make_observation(),
    "ArraySpectrum": ArraySpectrum([1.0, 1 / 3]),
    "StaticSpectrum": StaticSpectrum([1.0, 2.0], ["g", "r"]),
    "TransientSpectrum": TransientSpectrum([1.0, 2.0, 3.0], epochs=[1, "late"]),
    "GaussianMorphology": GaussianMorphology(2 / 3, [0.1, -1 / 3]),
    "PixelMorphology": PixelMorphology(RNG.uniform(size=(5, 7)), anchor=(1, 2)),
    "StarletMorphology": StarletMorphology(RNG.uniform(size=(2, 5, 7)), (1, 2), RNG.uniform(size=(2, 5, 7))),
    "PointMorphology": PointMorphology(),
    "Source": Source([1.5, 1 / 3], [1.0, 2.0], PointMorphology()),
    "CompositeSource": make_scene().sources["z"],
    "Scene": make_scene(),
    "Parameter": Parameter("a.b", (2,), True, unit_disk, PRIORS[2], "c.d", "pixel"),
    "Parameters": make_parameters(),
    "FitResult": make_result(),
    "GaussianMixturePSF": GaussianMixturePSF(
        [[0.7, 0.3], [0.4, 0.6]],
        RNG.uniform(1, 2, (2, 2, 1, 1)) * np.eye(2),
        integrate_pixel=True,
        residual=[1e-3, 1 / 3],
    ),
    "PerBand": link.PerBand({"g": 1 / 3, "r": 2.0}),
    "Polynomial": link.Polynomial([1 / 3, 2.0], WAVELENGTHS),
    "BSpline": link.BSpline([1 / 3, 2.0, 1.0], WAVELENGTHS, degree=1),
    "SersicMorphology": SersicMorphology(link.Polynomial([1 / 3, 2.0], WAVELENGTHS), 1.5, [0.1, -1 / 3]),
    "ExponentialMorphology": ExponentialMorphology(2 / 3, [0.1, -1 / 3]),
    "DeVaucouleursMorphology": DeVaucouleursMorphology(2 / 3),
    "ClumpyMorphology": ClumpyMorphology(2 / 3, 1.1, [0.1, -1 / 3], [[1 / 3, 2.0]], [1 / 7], [0.1, -2 / 3]),
    "MultiGaussianMorphology": MultiGaussianMorphology([1 / 3, 2.0], [0.2, 0.8], [0.1, -1 / 3]),
    "Diagnostics": Diagnostics({"a": np.array(1.001)}, {"a": np.array(1e3)}, float("nan"), 0.0),
    "Posterior": make_posterior(),
}


def assert_identical(loaded, saved):
    """Check fields, static ones included, and the bits of all arrays."""
    assert type(loaded) is type(saved)
    if isinstance(saved, eqx.Module):
        for name in saved.__dataclass_fields__:
            assert_identical(getattr(loaded, name), getattr(saved, name))
    elif isinstance(saved, dict):
        assert list(loaded) == list(saved)
        for key in saved:
            assert_identical(loaded[key], saved[key])
    elif isinstance(saved, tuple):
        assert len(loaded) == len(saved)
        for a, b in zip(loaded, saved, strict=True):
            assert_identical(a, b)
    elif isinstance(saved, np.ndarray | jax.Array):
        loaded, saved = np.asarray(loaded), np.asarray(saved)
        assert loaded.dtype == saved.dtype
        assert loaded.shape == saved.shape
        # The sign bit of NaN means nothing.
        assert np.nan_to_num(loaded).tobytes() == np.nan_to_num(saved).tobytes()
        np.testing.assert_array_equal(loaded, saved)
    elif isinstance(saved, WCS):
        assert_same_wcs(loaded, saved)
    elif isinstance(saved, dist.Distribution):
        a, b = jax.tree.flatten(loaded), jax.tree.flatten(saved)
        assert a[1] == b[1]
        assert [np.asarray(leaf).tobytes() for leaf in a[0]] == [np.asarray(leaf).tobytes() for leaf in b[0]]
    else:
        # NaN is itself.
        assert loaded == saved or (loaded != loaded and saved != saved)


def assert_same_wcs(loaded, saved):
    y, x = np.mgrid[-5:20:5, -5:20:5]
    there, back = loaded.pixel_to_world_values(x, y), saved.pixel_to_world_values(x, y)
    np.testing.assert_array_equal(there, back)
    np.testing.assert_array_equal(loaded.world_to_pixel_values(*back), saved.world_to_pixel_values(*back))
    assert loaded.array_shape == saved.array_shape
    assert list(loaded.wcs.ctype) == list(saved.wcs.ctype)
    a, b = (wcs.pixel_to_world(3.0, 4.0) for wcs in (loaded, saved))
    assert a.frame.name == b.frame.name


def round_trip(tmp_path, value):
    save(tmp_path / "file.asdf", value)
    return load(tmp_path / "file.asdf")


def test_examples_cover_every_class():
    assert set(serialization.CLASSES) == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_round_trip_is_identical(tmp_path, name):
    assert_identical(round_trip(tmp_path, EXAMPLES[name]), EXAMPLES[name])


@pytest.mark.parametrize("kind", HEADERS)
def test_wcs_is_lossless(tmp_path, kind):
    frame = Frame((16, 18), channels=["g"], wcs=make_wcs(kind))
    loaded = round_trip(tmp_path, frame).wcs
    if kind == "TPV":
        # wcslib keeps these coefficients to itself, so they pass through FITS cards of 14 digits.
        world = frame.wcs.pixel_to_world_values(3.0, 4.0)
        np.testing.assert_allclose(loaded.pixel_to_world_values(3.0, 4.0), world, rtol=1e-14)
    else:
        assert_same_wcs(loaded, frame.wcs)


def test_wcs_keeps_lookup_tables(tmp_path):
    wcs = make_wcs()
    table = RNG.normal(scale=0.1, size=(16, 18)).astype(np.float32)
    wcs.cpdis1 = DistortionLookupTable(table, (1.0, 1.0), (1.0, 1.0), (1.0, 1.0))
    loaded = round_trip(tmp_path, Frame((16, 18), channels=["g"], wcs=wcs)).wcs
    pixel = np.array([[3.2, 4.4]])
    np.testing.assert_array_equal(loaded.pix2foc(pixel, 0), wcs.pix2foc(pixel, 0))
    assert np.abs(loaded.pix2foc(pixel, 0) - pixel).max() > 0


@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: type(prior).__name__)
def test_priors(tmp_path, prior):
    loaded = round_trip(tmp_path, EXAMPLES["Parameter"].replace(prior=prior)).prior
    value = prior.sample(jax.random.key(1))
    assert type(loaded) is type(prior)
    np.testing.assert_array_equal(loaded.log_prob(value), prior.log_prob(value))


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
def test_constraints(tmp_path, constraint):
    loaded = round_trip(tmp_path, EXAMPLES["Parameter"].replace(constraint=constraint)).constraint
    assert type(loaded) is type(constraint)
    assert loaded == constraint


@pytest.mark.parametrize(
    "image", [np.zeros((5, 7)), np.full((5, 7), 1e-300), np.float32(RNG.uniform(size=(5, 7)))], ids=str
)
def test_images_come_back_as_fitted(tmp_path, image):
    pixels = eqx.tree_at(lambda m: m.image, EXAMPLES["PixelMorphology"], image)
    assert_identical(round_trip(tmp_path, pixels), pixels)
    starlets = eqx.tree_at(lambda m: m.coefficients, EXAMPLES["StarletMorphology"], np.stack([image, image]))
    assert_identical(round_trip(tmp_path, starlets), starlets)


def test_traced_arrays_become_numpy(tmp_path):
    morphology = GaussianMorphology(jax.numpy.asarray(1.5), jax.numpy.asarray([0.1, 0.2]))
    loaded = round_trip(tmp_path, morphology)
    assert isinstance(loaded.half_light_radius, np.ndarray)
    assert loaded.ellipticity.tobytes() == np.asarray(morphology.ellipticity).tobytes()


def test_observation_without_zeropoint_stays_in_its_units(tmp_path):
    obs = make_observation(zeropoint=None)
    loaded = round_trip(tmp_path, obs)
    assert loaded.flux_unit == "data units"
    assert_identical(loaded, obs)


@pytest.mark.parametrize("noise", [StudentTNoise, FloorNoise, PoissonNoise])
def test_observations_with_any_noise(tmp_path, noise):
    """In nJy, with pixels that carry no information."""
    values = RNG.uniform(1, 2, size=(2, 16, 18))
    obs = make_observation(noise=noise(values, [0.3, 1 / 3]) if noise is FloorNoise else noise(values))
    assert not obs.noise.valid.all()
    loaded = round_trip(tmp_path, obs)
    assert_identical(loaded, obs)
    assert loaded.log_likelihood(EXAMPLES["Scene"]) == obs.log_likelihood(EXAMPLES["Scene"])


def test_files_from_before_there_were_slopes(tmp_path, monkeypatch):
    obs = make_observation()
    whole = serialization.to_tree(obs)
    del whole["background_slope"]
    with monkeypatch.context() as patch:
        patch.setattr(serialization, "to_tree", lambda _: whole)
        save(tmp_path / "old.asdf", obs)
    assert_identical(load(tmp_path / "old.asdf"), obs.with_background(obs.background, np.zeros((2, 2))))


def test_loaded_scene_and_observations_predict_the_same(tmp_path):
    scene, obs = make_scene(), make_observation()
    matched = obs.match(scene.frame)
    loaded, (seen,) = round_trip(tmp_path, (scene, (matched,)))
    assert seen.renderer is None
    np.testing.assert_array_equal(seen.render(loaded), obs.render(scene))
    assert seen.log_likelihood(loaded) == obs.log_likelihood(scene)


def test_loaded_parameters_can_be_changed_and_used(tmp_path):
    parameters = round_trip(tmp_path, EXAMPLES["Parameters"])
    assert parameters["sources.z.parts.arms.center"].tied_to == "sources.z.parts.bulge.center"
    assert not parameters["sources.a.center"].free
    # 30 mas in arcsec
    np.testing.assert_allclose(parameters["observations.HSC.astrometry.shift"].prior.scale, 0.03, rtol=1e-6)
    assert parameters.free("sources.a.center")["sources.a.center"].free


def test_result_can_be_fitted_again(tmp_path):
    result = EXAMPLES["FitResult"]
    loaded = round_trip(tmp_path, result)
    assert loaded.status is Status.CONVERGED
    again, expected = (
        fit(each.scene, each.observations, each.parameters, max_steps=2, progress=False) for each in (loaded, result)
    )
    assert again.loss == expected.loss
    assert again.num_steps == expected.num_steps


class Outcome(enum.Enum):
    CONVERGED = "converged"


def test_newer_schema_asks_to_upgrade(tmp_path, monkeypatch):
    path = tmp_path / "new.asdf"
    with monkeypatch.context() as patch:
        patch.setattr(serialization, "SCHEMA_VERSION", 7)
        save(path, EXAMPLES["Box"])
    with pytest.raises(ValueError, match=r"schema version 7.*up to 1.*Upgrade: pip install"):
        load(path)


def test_older_schema_is_migrated(tmp_path, monkeypatch):
    path = tmp_path / "old.asdf"
    save(path, EXAMPLES["Box"])

    def enlarge(content):
        tree = {**content["object"], "shape": [2 * n for n in content["object"]["shape"]]}
        return {**content, "object": tree}

    monkeypatch.setattr(serialization, "SCHEMA_VERSION", 3)
    monkeypatch.setattr(serialization, "MIGRATIONS", {1: enlarge, 2: enlarge})
    assert load(path) == Box((12, 16), (-1, 2))


def test_every_older_schema_has_a_migration():
    assert set(serialization.MIGRATIONS) == set(range(1, serialization.SCHEMA_VERSION))


@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.5, 0.99])
def test_truncated_file(tmp_path, fraction):
    path = tmp_path / "cut.asdf"
    save(path, EXAMPLES["Observation"])
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(ValueError, match=r"cut\.asdf: expected an ASDF file written by scenefit\.save"):
        load(path)


def test_other_files(tmp_path):
    path = tmp_path / "other.asdf"
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load(path)
    asdf.AsdfFile({"a": 1}).write_to(path)
    with pytest.raises(ValueError, match="no scenefit schema version"):
        load(path)
    path.write_text("no ASDF at all")
    with pytest.raises(ValueError, match="expected an ASDF file"):
        load(path)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"type": "Popen", "args": ["true"]}, "unknown type 'Popen'"),
        ({"type": "distribution", "name": "os", "arguments": {}}, "unknown distribution 'os'"),
        ({"type": "constraint", "name": "os"}, "unknown constraint 'os'"),
        ({"type": "enum", "name": "os", "member": "A"}, "unknown enum 'os'"),
        ({"type": "Box", "shape": [-3, 4], "origin": [0, 0]}, "both >= 0"),
        ({"type": "Box", "shape": [3, 4]}, "origin"),
    ],
)
def test_only_known_things_are_built(tmp_path, tree, message):
    path = tmp_path / "crafted.asdf"
    asdf.AsdfFile({"scenefit": {"schema_version": 1, "object": tree}}).write_to(path)
    if tree == {"type": "Box", "shape": [3, 4]}:
        assert load(path) == Box((3, 4))
    else:
        with pytest.raises(ValueError, match=message):
            load(path)


class ForeignMorphology(PointMorphology):
    pass


@pytest.mark.parametrize(
    "thing",
    [
        ForeignMorphology(),
        Source([1.0, 2.0], [1.0], ForeignMorphology()),
        EXAMPLES["Parameter"].replace(prior=dist.TransformedDistribution(dist.Normal(0, 1), ExpTransform())),
        Outcome.CONVERGED,
        np.array(["text"]),
        object(),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_foreign_things_are_refused_and_nothing_is_written(tmp_path, thing):
    path = tmp_path / "file.asdf"
    save(path, EXAMPLES["Box"])
    with pytest.raises(TypeError, match=r"can't? be saved|can be saved"):
        save(path, thing)
    assert load(path) == EXAMPLES["Box"]
    assert [each.name for each in tmp_path.iterdir()] == ["file.asdf"]


def test_atomic_path_leaves_the_old_file_after_an_error(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected an existing folder .*nowhere"):
        save(tmp_path / "nowhere" / "file.asdf", EXAMPLES["Box"])


def test_saving_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        round_trip(tmp_path, make_observation("SIP"))
    assert (tmp_path / "file.asdf").exists()
