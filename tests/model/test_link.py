import astropy.units as u
import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.interpolate
from numpyro.distributions import constraints

from scenefit.app.serialization import load, save
from scenefit.data.observation import Observation
from scenefit.infer.fit import fit
from scenefit.model.link import AbstractLink, BSpline, PerBand, Polynomial, with_values
from scenefit.model.morphology import (
    ExponentialMorphology,
    GaussianMorphology,
    MultiGaussianMorphology,
    PointMorphology,
    SersicMorphology,
    in_channels,
    links,
    with_parameter_values,
)
from scenefit.model.parameters import Parameters, unit_disk
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from tests.helpers import final_classes, make_observation

WAVELENGTHS = {"g": 0.48, "r": 0.62, "i": 0.75, "z": 0.89, "y": 0.97}
CHANNELS = ("g", "r", "i")
LINKS = {
    "per band": PerBand({"g": 1.0, "r": 2.5, "i": 2.0}),
    "polynomial": Polynomial([1.0, 2.5], WAVELENGTHS),
    "spline": BSpline([1.0, 2.5, 2.0, 3.0], WAVELENGTHS),
}


def test_every_link_has_an_example():
    assert final_classes(AbstractLink) == {type(link) for link in LINKS.values()}


@pytest.mark.parametrize("name", LINKS)
def test_equal_values_are_one_value_in_every_band(name):
    link = LINKS[name]
    basis = link.basis(CHANNELS)
    assert basis.shape == (3, len(link.values))
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(basis.sum(axis=1), 1, atol=1e-12)


def test_bases_are_the_same_every_time():
    for count in range(2, 6):
        link = Polynomial(np.ones(count), WAVELENGTHS)
        assert len({link.basis_at([0.5, 0.66, 0.8]).tobytes() for _ in range(20)}) == 1, count


@pytest.mark.parametrize("name", LINKS)
def test_other_values_make_another_link_of_that_kind(name):
    link = LINKS[name]
    changed = with_values(link, 2 * link.values)
    assert type(changed) is type(link)
    np.testing.assert_array_equal(changed.values, 2 * link.values)
    np.testing.assert_array_equal(changed.basis(CHANNELS), link.basis(CHANNELS))
    assert not np.array_equal(link.values, changed.values)


@pytest.mark.parametrize("name", LINKS)
def test_all_epochs_of_a_band_have_its_value(name):
    basis = LINKS[name].basis([("r", 1), ("g", "first"), ("r", 2)])
    np.testing.assert_array_equal(basis, LINKS[name].basis(["r", "g", "r"]))


# ---- a value in each band


def test_per_band():
    values = {"r": (0.1, 0.2), "g": (0.3, 0.4)}
    for link in (PerBand(values), PerBand(np.array(list(values.values())), bands=("r", "g"))):
        assert link.bands == ("r", "g")
        assert link.values.shape == (2, 2)
        for band, value in values.items():
            np.testing.assert_array_equal(link.basis([band]) @ link.values, [value])


# ---- polynomials


@pytest.mark.parametrize("order", range(5))
def test_polynomials_are_polynomials(order, rng):
    coefficients = rng.normal(size=(order + 1, 2))
    polynomial = np.polynomial.Polynomial
    curves = [polynomial(c) for c in coefficients.T]
    blank = Polynomial(np.zeros((order + 1, 2)), WAVELENGTHS)
    link = with_values(blank, np.stack([curve(blank.knots) for curve in curves], axis=-1))
    assert link.order == order
    at = np.array([0.3, 0.48, 0.7, 0.97, 1.6])
    expected = np.stack([curve(at) for curve in curves], axis=-1)
    # 1e-10: rounding, outside the bands larger than the values by the growth of the basis.
    np.testing.assert_allclose(link.evaluate(at), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(link.evaluate(at * 1e4 * u.AA), expected, rtol=1e-10, atol=1e-10)
    bands = [("z", 3), "g"]
    expected = np.stack([curve(np.array([WAVELENGTHS["z"], WAVELENGTHS["g"]])) for curve in curves], axis=-1)
    np.testing.assert_allclose(link.basis(bands) @ link.values, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_knots_lie_between_the_bands(count):
    link = Polynomial(np.ones(count), WAVELENGTHS)
    assert link.knots.shape == (count,)
    assert (np.diff(link.knots) > 0).all()
    assert link.knots.min() >= 0.48
    assert link.knots.max() <= 0.97
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(link.evaluate(link.knots), link.values, rtol=1e-12)
    # Symmetric about the middle.
    np.testing.assert_allclose(link.knots + link.knots[::-1], 0.48 + 0.97, rtol=1e-12)


def test_as_many_knots_as_bands_are_the_bands():
    link = Polynomial([3.0, 1.0, 2.0], {"i": 0.75, "g": 0.48, "r": 0.62})
    np.testing.assert_array_equal(link.knots, [0.48, 0.62, 0.75])
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(link.basis(["g", "r", "i"]) @ link.values, [3.0, 1.0, 2.0], rtol=1e-12)


def test_a_constant_polynomial():
    link = Polynomial.constant((0.2, -0.1), 2, WAVELENGTHS)
    assert link.order == 2
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(link.evaluate([0.4, 0.7, 1.2]), [(0.2, -0.1)] * 3, rtol=1e-12)


def test_linear_trends_obey_the_constraint_of_their_values():
    """Constraints hold for the values; a parameter that leaves its range in a band has no image there."""
    e = Polynomial([(0.05, 0.0), (0.95, 0.0)], WAVELENGTHS)
    radius = Polynomial([0.1, 3.0], WAVELENGTHS)
    assert unit_disk(jnp.asarray(e.values)).all()
    for band in WAVELENGTHS:
        assert (radius.basis([band]) @ radius.values > 0).all(), band
        assert np.hypot(*(e.basis([band]) @ e.values)[0]) < 1, band
    frame = Frame((31, 31), channels=tuple(WAVELENGTHS))
    scene = Scene(frame, [Source((15, 15), np.ones(5), SersicMorphology(radius, 1.0, e))])
    assert np.isfinite(scene.evaluate()).all()


# ---- splines


@pytest.mark.parametrize(("count", "degree"), [(2, 1), (4, 1), (4, 2), (4, 3), (5, 3)])
def test_splines_against_scipy(count, degree, rng):
    values = rng.normal(size=(count, 2))
    link = BSpline(values, WAVELENGTHS, degree)
    knots = np.r_[[0.48] * degree, np.linspace(0.48, 0.97, count - degree + 1), [0.97] * degree]
    at = np.linspace(0.48, 0.97, 23)
    expected = scipy.interpolate.BSpline(knots, values, degree)(at)
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(link.evaluate(at), expected, atol=1e-12)
    np.testing.assert_allclose(link.evaluate(at * 1e3 * u.nm), expected, atol=1e-9)
    bands = [("z", 3), "g"]
    expected = scipy.interpolate.BSpline(knots, values, degree)([0.89, 0.48])
    np.testing.assert_allclose(link.basis(bands) @ link.values, expected, atol=1e-12)
    np.testing.assert_allclose(link.evaluate([0.48, 0.97]), values[[0, -1]], atol=1e-12)


def test_splines_stay_between_their_values(rng):
    basis = BSpline(np.ones(5), WAVELENGTHS, 3).basis_at(np.linspace(0.48, 0.97, 50))
    assert basis.min() >= 0
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(basis.sum(axis=1), 1, rtol=1e-12)


def test_a_constant_spline():
    link = BSpline.constant(1.7, 3, WAVELENGTHS)
    assert link.degree == 2
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(link.evaluate([0.5, 0.7]), 1.7, rtol=1e-12)
    assert BSpline.constant(1.7, 5, WAVELENGTHS, degree=1).degree == 1


def test_splines_do_not_extrapolate():
    with pytest.raises(ValueError, match=r"known from 0\.48 to 0\.97 micron only; got 0\.3 to 0\.5"):
        LINKS["spline"].evaluate([0.3, 0.5])


# ---- wavelengths


@pytest.mark.parametrize("kind", [Polynomial, lambda v, w: BSpline(v, w, 1)])
def test_wavelengths_may_have_units(kind):
    link = kind([1.0, 2.0], {"g": 480 * u.nm, "r": 6200 * u.AA, "i": 0.75, "z": 0.89 * u.um})
    # 1e-12: rounding of the conversion.
    assert link.wavelengths == pytest.approx({band: WAVELENGTHS[band] for band in "griz"}, rel=1e-12)


G_R = {"g": 0.48, "r": 0.62}
BAD = {
    "too few bands": (lambda: Polynomial([1, 2, 3], G_R), ValueError, r"order 2\) wants at least 3 bands; got 2"),
    "too few for a spline": (
        lambda: BSpline([1, 2, 3], G_R, 1),
        ValueError,
        r"BSpline of 3 values .* at least 3 bands",
    ),
    "no band": (lambda: Polynomial([1], {}), ValueError, r"wants at least 1 bands; got 0"),
    "repeated": (
        lambda: Polynomial([1, 2], {"g": 0.5, "h": 500 * u.nm, "r": 0.6}),
        ValueError,
        r"must be distinct; bands \['g', 'h'\] share \[0\.5\] micron",
    ),
    "zero": (lambda: Polynomial([1, 2], {"g": 0.0, "r": 0.6}), ValueError, "must be positive; got"),
    "negative": (lambda: BSpline([1, 2], {"g": -0.5, "r": 0.6}, 1), ValueError, "BSpline must be positive; got"),
    "nan": (lambda: Polynomial([1, 2], {"g": np.nan, "r": 0.6}), ValueError, "must be positive; got"),
    "a list": (lambda: Polynomial([1, 2], [0.5, 0.6]), TypeError, "as a mapping from band to wavelength; got"),
    "a string": (lambda: Polynomial([1, 2], {"g": "blue", "r": 0.6}), TypeError, "A wavelength must be real numbers"),
    "a time": (lambda: Polynomial([1, 2], {"g": 3 * u.s, "r": 0.6}), ValueError, "A wavelength must be in micron"),
    "one number": (lambda: Polynomial(3.0, G_R), ValueError, r"values of shape \(k, \.\.\.\), k >= 1; got shape \(\)"),
    "no value": (lambda: Polynomial([], G_R), ValueError, r"k >= 1; got shape \(0,\)"),
    "a broken order": (lambda: Polynomial.constant(1, 1.5, G_R), ValueError, "integer of at least 0; got 1.5"),
    "a negative order": (lambda: Polynomial.constant(1, -1, G_R), ValueError, "integer of at least 0; got -1"),
    "a high degree": (lambda: BSpline([1, 2], G_R, 2), ValueError, "of 2 values has a degree from 1 to 1; got 2"),
    "degree zero": (lambda: BSpline([1, 2], G_R, 0), ValueError, "of 2 values has a degree from 1 to 1; got 0"),
    "other bands": (
        lambda: PerBand(np.ones(2), ("g",)),
        ValueError,
        r"one value for each of distinct bands; got 2 for",
    ),
    "bands twice": (lambda: PerBand(np.ones(2), ("g", "g")), ValueError, "one value for each of distinct bands"),
    "no bands": (lambda: PerBand(np.ones(2)), ValueError, "one value for each of distinct bands"),
    "an unknown band": (
        lambda: Polynomial([1, 2], G_R).basis(["g", "z"]),
        ValueError,
        r"Polynomial knows the bands \['g', 'r'\]; the model also has 'z'\. Add its wavelength",
    ),
    "an unknown band of an epoch": (
        lambda: BSpline([1, 2], G_R, 1).basis([("z", 1)]),
        ValueError,
        r"BSpline knows the bands .* the model also has \('z', 1\)",
    ),
    "an unknown band of values": (lambda: PerBand({"g": 1}).basis(["r"]), ValueError, "PerBand knows the bands"),
    "pairs for a radius": (
        lambda: GaussianMorphology(Polynomial([(1, 2), (3, 4)], G_R)),
        ValueError,
        r"got \(2, 2\)",
    ),
    "numbers for a pair": (lambda: GaussianMorphology(2.0, Polynomial([1, 2], G_R)), ValueError, r"got \(2,\)"),
    "other rings": (
        lambda: MultiGaussianMorphology([1, 2, 3], PerBand({"g": (1, 2), "r": (1, 2)})),
        ValueError,
        r"got \(2, 2\)",
    ),
}


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("name", BAD)
def test_links_that_make_no_sense(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()


# ---- morphologies


EPOCHS = (("g", 1), ("r", 1), ("g", 2), ("i", 1))
# So small that every stamp holds all of the frame, and the number of rings is the same everywhere.
SHAPE = (20, 21)


def unlinked(morphology, band):
    """The morphology with the parameters it has in a band, by hand."""

    def value(parameter):
        if isinstance(parameter, PerBand):
            return parameter.values[parameter.bands.index(band)]
        return parameter.evaluate(parameter.wavelengths[band])[0]

    names = list(links(morphology))
    values = [value(getattr(morphology, name)) for name in names]
    is_link = {"is_leaf": lambda leaf: isinstance(leaf, AbstractLink)}
    return eqx.tree_at(lambda m: [getattr(m, name) for name in names], morphology, values, **is_link)


LINKED = {
    "all of a Sersic": SersicMorphology(
        Polynomial([1.2, 2.6], WAVELENGTHS),
        PerBand({"g": 0.9, "r": 2.0, "i": 3.0}),
        BSpline([(0.3, 0.1), (0.1, 0.4), (-0.2, 0.2)], WAVELENGTHS, 2),
    ),
    "an exponential": ExponentialMorphology(
        Polynomial([2.0, 1.5, 1.2], WAVELENGTHS), PerBand({"g": (0, 0), "r": (0.5, 0.0), "i": (0, -0.5)})
    ),
    "a Gaussian": GaussianMorphology(BSpline([0.5, 1.0, 3.0], WAVELENGTHS, 2), (0.2, 0.3)),
    "rings": MultiGaussianMorphology(
        [0.5, 1.5, 3.0],
        PerBand({"g": (3, 1, 1), "r": (1, 3, 1), "i": (0, 1, 2)}),
        Polynomial([(0, 0), (0.3, 0)], G_R | {"i": 0.75}),
    ),
}
PLACES = {"all of a Sersic": (9.3, 10.1), "an exponential": (9.0, 10.4), "a Gaussian": (9.6, 9.7), "rings": (10.0, 9.5)}


def by_hand(sources, channel, number):
    """The scene in one channel: unlinked sources on a frame of that channel alone."""
    band = channel[0] if isinstance(channel, tuple) else channel
    plain = {
        name: Source(source.center, [source.spectrum.flux[number]], unlinked(source.morphology, band))
        for name, source in sources.items()
    }
    return Scene(Frame(SHAPE, channels=(channel,)), plain).evaluate()[0]


def linked_sources(channels):
    return {
        name: Source(PLACES[name], 1.0 + np.arange(len(channels)) + n, morphology)
        for n, (name, morphology) in enumerate(LINKED.items())
    }


@pytest.mark.parametrize("name", LINKED)
def test_each_channel_shows_its_own_parameters(name, eps):
    sources = {name: linked_sources(EPOCHS)[name]}
    image = Scene(Frame(SHAPE, channels=EPOCHS), sources).evaluate()
    for number, channel in enumerate(EPOCHS):
        expected = by_hand(sources, channel, number)
        # 100 eps: rounding of sums of some twenty rings.
        np.testing.assert_allclose(image[number], expected, atol=100 * eps * expected.max())
    assert np.abs(image[0] / image[0].sum() - image[1] / image[1].sum()).max() > 1e-3


def test_sources_with_and_without_links_in_one_scene(eps):
    sources = {name: linked_sources(CHANNELS)[name] for name in ("an exponential", "a Gaussian")}
    sources |= {
        "point": Source((9, 10), [1.0, 2.0, 3.0], PointMorphology()),
        "plain": Source((10, 10), [4.0, 2.0, 3.0], GaussianMorphology(1.5, (0.1, 0.1))),
        # A link of another kind with values of the same shape: one stack.
        "the same shape": Source(
            (9.4, 9.9), [4.0, 2.0, 3.0], GaussianMorphology(PerBand({"g": 1.0, "r": 2.0, "i": 2.2}), (0.2, 0.3))
        ),
    }
    parts = {"disk": sources["an exponential"], "nucleus": sources["point"]}
    scene = {name: source for name, source in sources.items() if source not in parts.values()}
    image = Scene(Frame(SHAPE, channels=CHANNELS), scene | {"pair": CompositeSource(parts)}).evaluate()
    for number, channel in enumerate(CHANNELS):
        expected = by_hand(sources, channel, number)
        # 100 eps: rounding of sums of some twenty rings.
        np.testing.assert_allclose(image[number], expected, atol=100 * eps * expected.max())


def test_a_link_with_a_band_less():
    frame = Frame(SHAPE, channels=("g", "Y"))
    scene = Scene(frame, [Source((10, 10), [1.0, 1.0], LINKED["a Gaussian"])])
    with pytest.raises(ValueError, match=r"BSpline knows the bands .*; the model also has 'Y'"):
        scene.evaluate()


def test_in_channels():
    for morphology in LINKED.values():
        shapes = in_channels(morphology, EPOCHS)
        assert len(shapes) == 4
        assert not any(links(shape) for shape in shapes)
    plain = GaussianMorphology(2.0)
    assert in_channels(plain, EPOCHS) == [plain]


def test_other_parameter_values_keep_links(rng):
    morphology = LINKED["all of a Sersic"]
    index = np.array([1.0, 1.1, 1.2])
    changed = with_parameter_values(morphology, {"sersic_index": index})
    assert isinstance(changed.sersic_index, PerBand)
    np.testing.assert_array_equal(changed.sersic_index.values, index)
    np.testing.assert_array_equal(changed.half_light_radius.values, morphology.half_light_radius.values)


def test_paths_and_shapes_of_parameters():
    source = Source((10, 10), np.ones(3), LINKED["all of a Sersic"])
    scene = Scene(Frame(SHAPE, channels=CHANNELS), {"galaxy": source})
    obs = make_observation(SHAPE, wcs=None, channels=CHANNELS)
    parameters = Parameters.default(scene, [obs])
    base = "sources.galaxy.morphology"
    shapes = {p.path: p.shape for p in parameters if p.path.startswith(base)}
    assert shapes == {
        f"{base}.half_light_radius": (2,),
        f"{base}.sersic_index": (3,),
        f"{base}.ellipticity": (3, 2),
    }
    assert all(parameters[path].free for path in shapes)
    assert parameters[f"{base}.half_light_radius"].unit == "pixel"
    assert parameters[f"{base}.half_light_radius"].constraint is constraints.positive
    assert parameters[f"{base}.ellipticity"].constraint is unit_disk


# ---- fits, files


def test_a_fit_recovers_a_trend():
    truth = GaussianMorphology(
        Polynomial([1.6, 2.6], WAVELENGTHS), PerBand({"g": (0.3, 0.0), "r": (0.1, 0.2), "i": (0.0, -0.1)})
    )
    start = GaussianMorphology(Polynomial.constant(2.0, 1, WAVELENGTHS), PerBand(dict.fromkeys(CHANNELS, (0.0, 0.0))))
    frame = Frame((25, 25), channels=CHANNELS, padding=12)
    flux = np.array([300.0, 500.0, 400.0])
    blank = Observation(np.zeros(frame.shape), sigma=0.1, psf=GaussianPSF(1.2), channels=CHANNELS, name="one")
    data = blank.match(frame).render(Scene(frame, {"galaxy": Source((12.2, 11.9), flux, truth)}))
    obs = Observation(np.asarray(data), sigma=0.1, psf=GaussianPSF(1.2), channels=CHANNELS, name="one")
    result = fit(Scene(frame, {"galaxy": Source((12, 12), 0.7 * flux, start)}), obs, progress=False)
    assert result.is_converged
    fitted = result.scene.sources["galaxy"]
    assert isinstance(fitted.morphology.half_light_radius, Polynomial)
    # 1e-3: less than a tenth of the standard errors, 2 / 1000 for a signal-to-noise ratio of 600; the fit ends at a fiftieth.
    np.testing.assert_allclose(fitted.morphology.half_light_radius.values, [1.6, 2.6], atol=1e-3)
    np.testing.assert_allclose(fitted.morphology.ellipticity.values, truth.ellipticity.values, atol=1e-3)
    np.testing.assert_allclose(fitted.spectrum.flux, flux, rtol=1e-3)


@pytest.mark.parametrize("name", LINKED)
def test_files_keep_links(name, tmp_path):
    sources = linked_sources(CHANNELS)
    scene = Scene(Frame(SHAPE, channels=CHANNELS), {"galaxy": sources[name]})
    save(tmp_path / "scene.asdf", scene)
    loaded = load(tmp_path / "scene.asdf")
    before, after = scene.sources["galaxy"].morphology, loaded.sources["galaxy"].morphology
    assert links(after).keys() == links(before).keys()
    for key, link in links(before).items():
        same = links(after)[key]
        assert type(same) is type(link)
        np.testing.assert_array_equal(same.values, link.values)
        np.testing.assert_array_equal(same.basis(CHANNELS), link.basis(CHANNELS))
