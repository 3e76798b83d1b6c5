import astropy.units as u
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to

from scenefit.model.morphology import GaussianMorphology, PixelMorphology, PointMorphology
from scenefit.model.parameters import MAX_ROWS, Parameters, unit_disk
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.sky.frame import Frame
from tests.blends import FINE_SCALE, FINE_SHAPE
from tests.helpers import make_observation, tangent_wcs

SCALE, BLUR = "observations.{}.calibration.flux_scale", "observations.{}.calibration.psf_variance"
NOISE = "observations.{}.noise.scale"
SHIFT, BACKGROUND = "observations.{}.astrometry.shift", "observations.{}.background"
ROTATION = "observations.{}.astrometry.rotation"
SLOPE = BACKGROUND + "_slope"


@pytest.fixture(scope="module")
def frame():
    return Frame(FINE_SHAPE, channels=("g", "r"), wcs=tangent_wcs(FINE_SHAPE, FINE_SCALE))


@pytest.fixture(scope="module")
def observations():
    return [make_observation(name="HST", channels=("g",)), make_observation(name="HSC", channels=("g", "r"))]


@pytest.fixture(scope="module")
def scene(frame):
    host = Source((20, 20), [1.0, 2.0], GaussianMorphology(2.0, (0.1, 0.0)))
    nucleus = Source((20, 20), [1.0, 2.0], PointMorphology())
    smooth = np.add.outer(np.hanning(9), np.hanning(9)) + 0.01
    return Scene(
        frame,
        {
            "pair": CompositeSource({"host": host, "nucleus": nucleus}),
            "clumpy": Source((10, 10), [3.0, 3.0], PixelMorphology(np.ones((9, 9)), envelope=smooth)),
            "free": Source((30, 12), [3.0, 3.0], PixelMorphology(np.ones((7, 5)))),
            "galaxy": Source((30, 30), [3.0, 3.0], GaussianMorphology(1.0)),
        },
    )


@pytest.fixture(scope="module")
def parameters(scene, observations):
    return Parameters.default(scene, observations)


def free_paths(parameters):
    return {p.path for p in parameters if p.free}


def test_default_choice(parameters):
    host, nucleus = "sources.pair.parts.host", "sources.pair.parts.nucleus"
    shapes = {p.path: p.shape for p in parameters}
    assert shapes == {
        f"{host}.center": (2,),
        f"{host}.spectrum.flux": (2,),
        f"{host}.morphology.half_light_radius": (),
        f"{host}.morphology.ellipticity": (2,),
        f"{nucleus}.center": (2,),
        f"{nucleus}.spectrum.flux": (2,),
        "sources.clumpy.center": (2,),
        "sources.clumpy.spectrum.flux": (2,),
        "sources.clumpy.morphology.image": (9, 9),
        "sources.free.center": (2,),
        "sources.free.spectrum.flux": (2,),
        "sources.free.morphology.image": (7, 5),
        "sources.galaxy.center": (2,),
        "sources.galaxy.spectrum.flux": (2,),
        "sources.galaxy.morphology.half_light_radius": (),
        "sources.galaxy.morphology.ellipticity": (2,),
        SHIFT.format("HST"): (2,),
        ROTATION.format("HST"): (),
        BACKGROUND.format("HST"): (1,),
        SHIFT.format("HSC"): (2,),
        ROTATION.format("HSC"): (),
        BACKGROUND.format("HSC"): (2,),
        SLOPE.format("HST"): (1, 2),
        SLOPE.format("HSC"): (2, 2),
        SCALE.format("HST"): (1,),
        SCALE.format("HSC"): (2,),
        BLUR.format("HST"): (1,),
        BLUR.format("HSC"): (2,),
        NOISE.format("HST"): (1,),
        NOISE.format("HSC"): (2,),
    }
    fixed = {"sources.clumpy.center", "sources.free.center"}
    fixed |= {
        path.format(name)
        for path in (SHIFT, ROTATION, BACKGROUND, SLOPE, SCALE, BLUR, NOISE)
        for name in ("HST", "HSC")
    }
    assert free_paths(parameters) == shapes.keys() - fixed
    assert parameters["sources.galaxy.spectrum.flux"].constraint is constraints.nonnegative
    assert parameters["sources.galaxy.morphology.ellipticity"].constraint is unit_disk
    assert parameters["sources.clumpy.morphology.image"].constraint is constraints.nonnegative
    assert {p.path for p in parameters if p.prior is not None and p.free} == {"sources.clumpy.morphology.image"}


def test_pixels_are_drawn_to_their_envelope(parameters, scene):
    prior = parameters["sources.clumpy.morphology.image"].prior
    envelope = scene.sources["clumpy"].morphology.envelope
    # 1e-6: numpyro may keep float32.
    np.testing.assert_allclose(prior.loc, envelope, rtol=1e-6)
    relative = np.asarray(prior.scale) / envelope
    np.testing.assert_allclose(relative, relative[4, 4], rtol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("sources.galaxy.center", 1),
        ("sources.*.center", 5),
        ("sources.galaxy", 4),
        ("sources.*.morphology", 6),
        ("sources.pair.parts.*.spectrum.flux", 2),
        ("observations.HSC", 7),
        ("observations.*.astrometry.shift", 2),
        ("*", 30),
    ],
)
def test_patterns(parameters, pattern, count):
    found = parameters.match(pattern)
    assert len(found) == len(set(found)) == count


def test_parameters_are_shown_as_a_list(parameters):
    tied = parameters.free("observations.HSC.astrometry.shift")
    tied = tied.tie("sources.pair.parts.host.center", "sources.galaxy.center")
    first, *rows = repr(tied).split("\n")
    assert first == f"Parameters: {sum(tied.is_fitted(path) for path in tied.table)} of {len(tied.table)} fitted"
    assert len(rows) == len(tied.table) <= MAX_ROWS
    assert "sources.galaxy.center: = sources.pair.parts.host.center, [2], pixel" in rows
    assert any(row.startswith("observations.HSC.astrometry.shift: free, [2], arcsec") for row in rows)
    many = Parameters({f"sources.{n}.center": tied["sources.pair.parts.host.center"] for n in range(MAX_ROWS + 5)})
    assert repr(many).endswith("... and 5 more: `match` lists those of a pattern")


@pytest.mark.parametrize("method", ["match", "fix", "free", "__getitem__", "tie"])
def test_an_unknown_path_raises_with_the_nearest(parameters, method):
    with pytest.raises(
        KeyError, match=r"No parameter matches 'sources.galaxy.centre'.*Nearest:.*sources.galaxy.center"
    ):
        getattr(parameters, method)("sources.galaxy.centre")


def test_unknown_paths_of_priors_and_ties(parameters):
    with pytest.raises(KeyError, match="No parameter matches"):
        parameters.prior("sources.galaxy.sersic_index", dist.Normal(0, 1))
    with pytest.raises(KeyError, match="No parameter matches"):
        parameters.tie("sources.galaxy.center", "sources.nobody.center")
    with pytest.raises(KeyError, match="No parameter matches"):
        parameters.constrain("nonsense", constraints.real)


def test_a_prefix_of_a_name_is_no_match(parameters):
    with pytest.raises(KeyError):
        parameters.match("sources.gal")


@pytest.mark.parametrize("name", ["a[1]", "a?", "a+b", "a b"])
def test_a_star_alone_is_special(name):
    sources = {n: Source((20, 20), [1.0], PointMorphology()) for n in (name, "a1", "ab")}
    scene = Scene(Frame(FINE_SHAPE, channels="g"), sources)
    parameters = Parameters.default(scene, [make_observation(wcs=None)])
    assert parameters.match(f"sources.{name}.center") == [f"sources.{name}.center"]
    assert len(parameters.match("sources.a*.center")) == 3


def test_one_parameter_is_asked_for_by_its_path(parameters):
    with pytest.raises(ValueError, match=r"'sources\.\*\.center' names 5 parameters; match\(\) lists them"):
        parameters["sources.*.center"]


def test_fix_and_free_return_changed_copies(parameters):
    fixed = parameters.fix("sources.*.center")
    assert free_paths(parameters) - free_paths(fixed) == {
        "sources.galaxy.center",
        "sources.pair.parts.host.center",
        "sources.pair.parts.nucleus.center",
    }
    assert free_paths(fixed.free("sources.galaxy.center")) - free_paths(fixed) == {"sources.galaxy.center"}
    assert parameters["sources.galaxy.center"].free


def test_constraints_can_be_exchanged(parameters):
    changed = parameters.constrain("sources.galaxy.spectrum.flux", constraints.real)
    assert changed["sources.galaxy.spectrum.flux"].constraint is constraints.real
    assert parameters["sources.galaxy.spectrum.flux"].constraint is constraints.nonnegative


@pytest.mark.parametrize(
    ("path", "scale", "expected"),
    [
        (SHIFT.format("HSC"), 30 * u.mas, 0.03),
        (SHIFT.format("HSC"), 0.02, 0.02),
        ("sources.galaxy.center", 0.2 * u.arcsec, 2.0),
        ("sources.galaxy.center", 1.5 * u.pix, 1.5),
        ("sources.galaxy.spectrum.flux", 2 * u.uJy, 2000.0),
        (BACKGROUND.format("HST"), 3 * u.nJy, 3.0),
        ("sources.galaxy.morphology.half_light_radius", 150 * u.mas, 1.5),
    ],
)
def test_priors_take_quantities(parameters, path, scale, expected):
    prior = parameters.prior(path, dist.Normal(0, scale))[path].prior
    assert isinstance(prior, dist.Normal)
    # 1e-6: numpyro may keep float32.
    assert float(prior.scale) == pytest.approx(expected, rel=1e-6)


def test_a_prior_comes_with_freeing_and_goes_again(parameters):
    path = SHIFT.format("HSC")
    changed = parameters.free(path, prior=dist.Normal(0, 30 * u.mas))
    assert changed[path].free
    assert float(changed[path].prior.scale) == pytest.approx(0.03, rel=1e-6)  # numpyro may keep float32
    assert changed.prior(path, None)[path].prior is None


def test_a_quantity_for_a_number_without_unit(parameters):
    with pytest.raises(ValueError, match="has no unit; its prior must be plain numbers"):
        parameters.prior("sources.galaxy.morphology.ellipticity", dist.Normal(0, 3 * u.arcsec))


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("prior", [0.03, "flat", dist.Normal, constraints.real])
def test_what_is_no_prior(parameters, prior):
    with pytest.raises(TypeError, match=r"A prior is a distribution from numpyro\.distributions, or None; got"):
        parameters.prior(SHIFT.format("HSC"), prior)


def test_a_prior_in_another_unit(parameters):
    with pytest.raises(ValueError, match=r"The prior of observations\.HSC\.astrometry\.shift must be in arcsec"):
        parameters.prior(SHIFT.format("HSC"), dist.Normal(0, 3 * u.nJy))


def test_a_prior_of_another_shape(parameters):
    shift = SHIFT.format("HSC")
    assert parameters.prior(shift, dist.Normal(np.zeros(2), 0.1))[shift].prior.batch_shape == (2,)
    with pytest.raises(ValueError, match=r"shift must have a shape that broadcasts to \(2,\); got \(3,\)"):
        parameters.prior(shift, dist.Normal(np.zeros(3), 0.1))


def test_an_angle_needs_a_wcs():
    scene = Scene(Frame(FINE_SHAPE, channels="g"), [Source((20, 20), [1.0], PointMorphology())])
    parameters = Parameters.default(scene, [make_observation(wcs=None)])
    with pytest.raises(ValueError, match=r"no WCS: the prior of sources\.0\.center must be in pixels, not 0\.2 arcsec"):
        parameters.prior("sources.0.center", dist.Normal(0, 0.2 * u.arcsec))


def test_freeing_all_shifts_raises(parameters):
    with pytest.raises(ValueError, match=r"All observations' astrometry\.shift are free; nothing then says where"):
        parameters.free("observations.*.astrometry.shift")
    one = parameters.free(SHIFT.format("HST"))
    with pytest.raises(ValueError, match="Keep at least one"):
        one.free(SHIFT.format("HSC"))
    one.check_anchored()
    assert one.fix(SHIFT.format("HST")).free(SHIFT.format("HSC"))[SHIFT.format("HSC")].free


def test_the_only_shift_can_not_be_free(scene, observations):
    with pytest.raises(ValueError, match="nothing then says where the model lies"):
        Parameters.default(scene, observations[:1]).free(SHIFT.format("HST"))


def test_ties(parameters):
    host, nucleus = "sources.pair.parts.host.center", "sources.pair.parts.nucleus.center"
    tied = parameters.tie(host, nucleus)
    assert tied[nucleus].tied_to == host
    assert tied[host].tied_to is None
    # A chain leads to its first member.
    assert tied.tie(nucleus, "sources.galaxy.center")["sources.galaxy.center"].tied_to == host
    assert parameters[nucleus].tied_to is None


def test_a_chain_of_ties_leads_to_one_parameter(parameters):
    """Tying a parameter that others are tied to takes them along."""
    host, nucleus, galaxy = (f"sources.{name}.center" for name in ("pair.parts.host", "pair.parts.nucleus", "galaxy"))
    tied = parameters.tie(host, nucleus).tie(galaxy, host)
    assert tied[host].tied_to == galaxy
    assert tied[nucleus].tied_to == galaxy


def test_a_shift_tied_to_a_free_one_is_no_anchor(parameters):
    tied = parameters.tie(SHIFT.format("HST"), SHIFT.format("HSC"))
    tied.check_anchored()
    with pytest.raises(ValueError, match="nothing then says where"):
        tied.free(SHIFT.format("HST"))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("sources.galaxy.center", "sources.galaxy.center", "can't be tied to itself"),
        ("sources.galaxy.center", "sources.galaxy.morphology.half_light_radius", "one shape and constraint"),
        ("sources.galaxy.center", "sources.galaxy.spectrum.flux", "one shape and constraint"),
        ("sources.*.center", "sources.galaxy.center", "matches 5"),
        ("sources.clumpy.morphology.image", "sources.free.morphology.image", "one shape and constraint"),
    ],
)
def test_ties_that_make_no_sense(parameters, first, second, message):
    with pytest.raises(ValueError, match=message):
        parameters.tie(first, second)


def test_images_can_not_be_tied(frame, observations):
    sources = {name: Source((20, 20), [1.0, 1.0], PixelMorphology(np.ones((5, 5)))) for name in "ab"}
    parameters = Parameters.default(Scene(frame, sources), observations)
    with pytest.raises(ValueError, match="Images can't be tied"):
        parameters.tie("sources.a.morphology.image", "sources.b.morphology.image")


def test_observation_names_that_repeat(scene, observations):
    with pytest.raises(ValueError, match="names must be distinct; 'HST' repeats"):
        Parameters.default(scene, [*observations, observations[0]])


@pytest.mark.parametrize("pair", [(0.0, 0.0), (0.3, -0.4), (0.0, 0.99)])
def test_the_unit_disk(pair, eps):
    transform = biject_to(unit_disk)
    e = np.array(pair)
    v = np.asarray(transform.inv(e))
    # 1e-5: near the edge of the disk 1 - |e|^2 = 0.02 loses two digits.
    np.testing.assert_allclose(transform(v), e, atol=1e-5)
    np.testing.assert_allclose(v, e / np.sqrt(1 - e @ e), rtol=1e-5)
    jacobian = np.eye(2) / np.sqrt(1 + v @ v) - np.outer(v, v) / (1 + v @ v) ** 1.5
    expected = np.log(np.linalg.det(jacobian))
    # 1e-5: rounding of v, as above.
    assert float(transform.log_abs_det_jacobian(v, transform(v))) == pytest.approx(expected, abs=1e-5)
