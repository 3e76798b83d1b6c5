import astropy.units as u
import equinox as eqx
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro.distributions import constraints

import scenefit as sf
from scenefit.data.noise import FloorNoise, PoissonNoise
from scenefit.data.observation import Observation
from scenefit.infer import posterior
from scenefit.infer.fit import fit
from scenefit.infer.laplace import vector_covariance
from scenefit.model import link
from scenefit.model.morphology import (
    GaussianMorphology,
    MultiGaussianMorphology,
    PixelMorphology,
    PointMorphology,
    SersicMorphology,
    parameter_values,
)
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.model.spectrum import StaticSpectrum, TransientSpectrum
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF
from scenefit.survey.priors import automatic, check_start
from tests.helpers import make_observation

SHAPE, PSF_SIGMA = (72, 72), 1.5
SKY, SLOPE = 12.0, (0.01, -0.02)
BACKGROUND, BACKGROUND_SLOPE = "observations.obs.background", "observations.obs.background_slope"
FLUX, RADIUS = "sources.0.spectrum.flux", "sources.0.morphology.half_light_radius"

FIELD = {
    "bright": Source((20, 22), [20000.0], SersicMorphology(5.0, 3.0, (0.3, 0.1))),
    "neighbour": Source((25, 27), [3000.0], SersicMorphology(2.0, 1.0, (-0.4, 0.2))),
    "wide": Source((50, 48), [4000.0], SersicMorphology(9.0, 0.7, (0.1, -0.7))),
    "faint": Source((55, 14), [60.0], GaussianMorphology(2.0)),
    "star": Source((14, 56), [900.0], PointMorphology()),
}


def observe(scene, *, seed=0, sigma=1.0, sky=0.0, slope=(0.0, 0.0), **options):
    """Return an observation of a scene, as a user has it: its sky isn't known."""
    kind = {"psf": GaussianPSF(PSF_SIGMA), "channels": scene.frame.channels, "name": "obs", "sigma": sigma, **options}
    shape = (len(scene.frame.channels), *scene.frame.box.shape)
    empty = Observation(np.zeros(shape), **kind)
    noise = sigma * np.random.default_rng(seed).normal(size=shape)
    return Observation(empty.with_background(sky, slope).render(scene) + noise, **kind)


def field(sources=None, channels=("g",)):
    return Scene(Frame(SHAPE, channels=channels), FIELD if sources is None else sources)


def crude(scene, offset=(0.8, -0.6)):
    """Return a scene of small round galaxies of unit flux, a pixel off."""
    return Scene(
        scene.frame,
        {
            name: Source(
                np.asarray(source.center) + offset,
                np.ones(len(scene.frame.channels)),
                PointMorphology() if isinstance(source.morphology, PointMorphology) else SersicMorphology(1.0, 1.0),
            )
            for name, source in scene.sources.items()
        },
    )


def with_sky(parameters):
    return parameters.free(BACKGROUND).free(BACKGROUND_SLOPE)


def values_of(scene, obs):
    """Return the values of a scene and an observation of a flat field, by path."""
    values = {BACKGROUND: obs.background, BACKGROUND_SLOPE: obs.background_slope}
    for path, component in scene.components():
        values |= {f"{path}.center": component.center, f"{path}.spectrum.flux": component.spectrum.flux}
        values |= {f"{path}.morphology.{k}": v for k, v in parameter_values(component.morphology).items()}
    return values


def deviations(parameters, values):
    """Return how many standard deviations values are from the means of their priors, by path."""
    found = {}
    for p in parameters:
        if p.free and p.path in values:
            sigma = np.sqrt(np.asarray(p.prior.variance))
            found[p.path] = float(np.abs((np.asarray(values[p.path]) - np.asarray(p.prior.mean)) / sigma).max())
    return found


def scale_of(parameters, path):
    """Return the width of a prior, before it is cut off."""
    prior = parameters[path].prior
    return np.asarray(getattr(prior, "base_dist", prior).scale)


def location_of(parameters, path):
    prior = parameters[path].prior
    return np.asarray(getattr(prior, "base_dist", prior).loc)


# ---- the truth is within reach


@pytest.mark.parametrize("start", ["true", "crude", "bloated"])
def test_the_truth_of_a_field_is_within_three_standard_deviations(start):
    truth = field()
    obs = observe(truth, sky=SKY, slope=SLOPE)
    known = values_of(truth, obs.with_background(SKY, SLOPE))
    scene = truth if start == "true" else crude(truth)
    if start == "bloated":
        large = {
            n: Source(s.center, [1e5], SersicMorphology(12.0, 4.0)) for n, s in scene.sources.items() if n != "star"
        }
        scene = scene.with_sources(**large)
    changed = automatic(scene, [obs], with_sky(Parameters.default(scene, [obs])))
    off = deviations(changed, known)
    # The faint one is a Gaussian.
    assert off.keys() | {"sources.faint.morphology.sersic_index"} >= {p.path for p in changed if p.free}
    assert max(off.values()) < 3, off


def random_galaxy(rng):
    radius, angle = np.exp(rng.uniform(0, np.log(9))), rng.uniform(0, 2 * np.pi)
    signal_to_noise = np.exp(rng.uniform(np.log(5), np.log(2000)))
    flux = signal_to_noise * np.sqrt(4 * np.pi) * np.hypot(PSF_SIGMA, radius / 1.18)
    ellipticity = rng.uniform(0, 0.8) * np.array([np.cos(angle), np.sin(angle)])
    return Source(rng.uniform(28, 44, 2), [flux], SersicMorphology(radius, rng.uniform(0.5, 6), ellipticity))


def test_the_truth_of_single_galaxies_is_within_three_standard_deviations(rng):
    """From starts of flux 1 and radius 1, whatever the galaxy: signal to noise from 5 to 2000, radii from 1 to 9 pixels."""
    for seed in range(25):
        truth = field([random_galaxy(rng)])
        obs = observe(truth, seed=seed, sky=SKY, slope=SLOPE)
        scene = crude(truth, rng.uniform(-1, 1, 2))
        changed = automatic(scene, [obs], with_sky(Parameters.default(scene, [obs])))
        off = deviations(changed, values_of(truth, obs.with_background(SKY, SLOPE)))
        assert len(off) == 7
        assert max(off.values()) < 3, off


# ---- the data decide


def fitted(scene, obs, parameters):
    """Return the coordinates of a fit and their standard errors."""
    result = fit(scene, [obs], parameters, progress=False, rtol=2e-3, throw=True)
    problem, state, layout = posterior.build(result.scene, result.observations, result.parameters)
    index, covariance = vector_covariance(problem, state, layout, result.scene, result.observations)
    return np.asarray(state.vector, dtype=float)[index], np.sqrt(covariance.diagonal())


@pytest.mark.parametrize(("index", "seed"), [(1.0, 1), (2.5, 2), (2.5, 3)])
def test_the_posterior_of_a_bright_source_does_not_depend_on_the_priors(index, seed):
    truth = field([Source((35, 37), [3000.0], SersicMorphology(3.0, index, (0.3, 0.1)))])
    obs = observe(truth, seed=seed, sky=SKY, slope=SLOPE)
    parameters = with_sky(Parameters.default(truth, [obs]))
    plain, errors = fitted(truth, obs, parameters)
    informed, narrower = fitted(truth, obs, automatic(truth, [obs], parameters))
    assert len(plain) == 10
    # 0.3 standard errors: hardly seen in a result. (The sky's is the largest shift, its prior being from the same pixels.)
    assert (np.abs(informed - plain) / errors).max() < 0.3
    # 10 % at most of any error: the priors hold at most a fifth of the information.
    assert (narrower / errors).min() > 0.9


# ---- units


@pytest.mark.parametrize("unit", [1e6, 1e-20])
def test_priors_are_the_same_in_the_unit_of_the_data(unit):
    truth = field()
    priors = []
    for factor in (1.0, unit):
        sources = {n: Source(s.center, factor * s.spectrum.flux, s.morphology) for n, s in FIELD.items()}
        scene = Scene(truth.frame, sources)
        plain = observe(truth, sky=SKY, slope=SLOPE)
        weights = 1 / np.full(plain.shape, factor**2)
        obs = Observation(
            factor * plain.data,
            noise=FloorNoise(weights, 0.3 * factor),
            psf=plain.psf,
            channels=("g",),
            name="obs",
        )
        priors.append(automatic(scene, [obs], with_sky(Parameters.default(scene, [obs]))))
    for p in priors[0]:
        if p.prior is None or isinstance(p.prior, dist.Uniform):
            continue
        factor = unit if p.unit.startswith("flux") else 1.0
        # 1e-6: the noise level of a floor is computed in single precision; tiny slopes are differences of large numbers.
        np.testing.assert_allclose(scale_of(priors[1], p.path) / factor, scale_of(priors[0], p.path), rtol=1e-6)
        np.testing.assert_allclose(
            location_of(priors[1], p.path) / factor, location_of(priors[0], p.path), rtol=1e-6, atol=1e-9
        )


def test_a_start_of_flux_one_suits_any_unit():
    truth = field()
    bright = Scene(truth.frame, {n: Source(s.center, 1e6 * s.spectrum.flux, s.morphology) for n, s in FIELD.items()})
    scene = crude(truth)
    plain = automatic(scene, [observe(truth)])
    scaled = automatic(scene, [observe(bright, sigma=1e6)])
    for name in FIELD:
        path = f"sources.{name}.spectrum.flux"
        # 1e-6: the images are rendered in single precision.
        np.testing.assert_allclose(scale_of(scaled, path) / 1e6, scale_of(plain, path), rtol=1e-6)


# ---- everything that is free has one


def several_instruments():
    """Return a scene with every kind of parameter, seen by two instruments, and parameters of which much is free."""
    fine = make_observation((60, 60), name="fine", scale_arcsec=0.1, channels=("v",), psf=GaussianPSF(1.2))
    coarse = make_observation((24, 24), name="coarse", scale_arcsec=0.25, channels=("g", "r"), rotation_deg=20.0)
    coarse = coarse.with_noise(FloorNoise(np.ones((2, 24, 24)), [0.3, 0.4]))
    observations = [fine, coarse]
    frame = Frame.from_observations(observations)
    bands = ("v", "g", "r")
    wavelengths = dict(zip(bands, (0.6, 0.48, 0.62), strict=True))
    linked = SersicMorphology(
        link.PerBand({band: 2.0 + n for n, band in enumerate(bands)}),
        link.Polynomial.constant(1.5, 1, wavelengths),
        link.BSpline.constant((0.1, 0.0), 3, wavelengths),
    )
    middle, flux = np.array(frame.center), [10.0, 20.0, 30.0]
    sources = {
        "linked": Source(middle + np.array([5, 3]), flux, linked),
        "pair": CompositeSource(
            {
                "bulge": Source(middle, flux, SersicMorphology(2.0, 4.0)),
                "disk": Source(middle, flux, GaussianMorphology(4.0)),
            }
        ),
        "star": Source(middle - (9, 8), StaticSpectrum(flux, bands), PointMorphology()),
        "rings": Source(middle - (9, -8), flux, MultiGaussianMorphology.log_spaced(1.0, 8.0, 4)),
        "clumpy": Source(middle + np.array([9, -8]), flux, PixelMorphology(np.ones((9, 9)), envelope=np.ones((9, 9)))),
        "free": Source(middle + 12, flux, PixelMorphology(np.ones((7, 7)))),
    }
    scene = Scene(frame, sources)
    parameters = Parameters.default(scene, observations)
    for name in ("background", "background_slope"):
        parameters = parameters.free(f"observations.*.{name}")
    parameters = parameters.free("observations.coarse.astrometry.shift").free("sources.clumpy.center")
    return scene, observations, parameters


def test_every_free_parameter_has_a_prior_of_its_shape():
    scene, observations, parameters = several_instruments()
    changed = automatic(scene, observations, parameters)
    without = {p.path for p in changed if p.free and p.prior is None}
    # Its pixels have no envelope.
    assert without == {"sources.free.morphology.image"}
    assert len([p for p in changed if p.free]) == 31
    for p in changed:
        if p.free and p.path.split(".")[-1] not in ("image", "amplitudes"):
            one_for_all = p.path.endswith(("sersic_index", "ellipticity"))
            assert p.prior.batch_shape == (() if one_for_all else p.shape), p.path
            assert p.prior.event_shape == ()
    assert changed["sources.linked.morphology.half_light_radius"].prior.batch_shape == (3,)
    assert changed["sources.linked.morphology.ellipticity"].shape == (3, 2)
    assert changed["observations.coarse.background_slope"].prior.batch_shape == (2, 2)
    np.testing.assert_array_equal(location_of(changed, "sources.linked.morphology.half_light_radius"), [2, 3, 4])
    for path in ("sources.rings.morphology.amplitudes", "sources.clumpy.morphology.image"):
        assert changed[path].prior is parameters[path].prior


def test_the_loss_has_the_priors_in_few_kinds():
    scene, observations, parameters = several_instruments()
    observations = [obs.match(scene.frame) for obs in observations]
    changed = automatic(scene, observations, parameters)
    problem, state, layout = posterior.build(scene, observations, changed)
    elements, log_prior = eqx.filter_jit(lambda p, v: (p.elements(v), p.log_prior(v)))(problem, state.vector)
    elements, expected = np.asarray(elements, dtype=float), 0.0
    for path, (numbers, unit) in layout.places.items():
        if changed[path].prior is not None:
            expected += float(np.asarray(changed[path].prior.log_prob(elements[numbers] * unit)).sum())
    assert np.isfinite(expected)
    # 1e-5: single precision.
    assert float(log_prior) == pytest.approx(expected, rel=1e-5)
    # Compiling takes as long for a hundred sources: normal, truncated, uniform and half-Cauchy, each of few shapes.
    assert len(problem.priors) < 20


def test_what_is_free_does_not_change():
    scene, observations, parameters = several_instruments()
    before = {p.path: (p.free, p.tied_to, p.prior) for p in parameters}
    changed = automatic(scene, observations, parameters)
    assert {p.path: (p.free, p.tied_to, p.prior) for p in parameters} == before
    assert {p.path: (p.free, p.tied_to) for p in changed} == {path: (f, t) for path, (f, t, _) in before.items()}
    assert all(changed[path].prior is prior for path, (free, _, prior) in before.items() if not free)
    assert changed.pixel_scale == parameters.pixel_scale


def test_one_observation_and_default_parameters():
    scene = field()
    obs = observe(scene)
    one, listed = automatic(scene, obs), automatic(scene, [obs], Parameters.default(scene, [obs]))
    assert eqx.tree_equal(one.table, listed.table)
    assert one[BACKGROUND].prior is None


def test_ties_are_left_alone():
    scene, observations, parameters = several_instruments()
    bulge, disk = (f"sources.pair.parts.{name}.center" for name in ("bulge", "disk"))
    changed = automatic(scene, observations, parameters.tie(bulge, disk))
    assert changed[disk].prior is None
    assert changed[disk].tied_to == bulge
    np.testing.assert_array_equal(location_of(changed, bulge), scene.sources["pair"].parts["bulge"].center)


def test_priors_of_the_users_own_stay():
    scene = field()
    obs = observe(scene)
    own = "sources.bright.morphology.half_light_radius"
    parameters = Parameters.default(scene, [obs]).prior(own, dist.LogNormal(1.0, 0.7))
    changed = automatic(scene, [obs], parameters)
    assert changed[own].prior is parameters[own].prior
    assert changed["sources.neighbour.morphology.half_light_radius"].prior is not None
    # Nor are its own made anew, but for those taken away.
    path = "sources.bright.center"
    again = automatic(scene, [obs], changed.prior(path, None), scale=3.0)
    assert scale_of(again, path)[0] == 3 * scale_of(changed, path)[0]
    assert again[path.replace("bright", "star")].prior is changed[path.replace("bright", "star")].prior


def test_amplitudes_have_their_prior_back():
    scene, observations, parameters = several_instruments()
    path = "sources.rings.morphology.amplitudes"
    changed = automatic(scene, observations, parameters.prior(path, None))
    assert eqx.tree_equal(changed[path].prior, parameters[path].prior)
    flat = parameters.prior("sources.clumpy.morphology.image", None)
    assert automatic(scene, observations, flat)["sources.clumpy.morphology.image"].prior is None


# ---- rules


def test_priors_end_where_the_constraint_does():
    scene = field([FIELD["bright"]])
    obs = observe(scene)
    parameters = Parameters.default(scene, [obs])
    changed = automatic(scene, [obs], parameters)
    supports = {p.path: p.prior.support for p in changed if p.free}
    assert supports[FLUX].lower_bound == supports[RADIUS].lower_bound == 0
    index = changed["sources.0.morphology.sersic_index"].prior
    assert isinstance(index, dist.Uniform)
    assert (float(index.low), float(index.high)) == (0.4, 8.0)
    narrow = parameters.constrain(RADIUS, constraints.interval(1.0, 20.0)).constrain(FLUX, constraints.real)
    changed = automatic(scene, [obs], narrow)
    assert (float(changed[RADIUS].prior.low), float(changed[RADIUS].prior.high)) == (1.0, 20.0)
    assert isinstance(changed[FLUX].prior, dist.Normal)


def test_ellipticities_are_isotropic():
    scene = field([FIELD["bright"]])
    prior = automatic(scene, observe(scene))["sources.0.morphology.ellipticity"].prior
    angle = np.linspace(0, 2 * np.pi, 9)
    densities = np.asarray(prior.log_prob(0.7 * np.stack([np.cos(angle), np.sin(angle)], axis=-1))).sum(axis=-1)
    # 1e-5: single precision.
    np.testing.assert_allclose(densities, 2 * scipy.stats.norm(0, 0.5).logpdf(0.7 / np.sqrt(2)), rtol=1e-5)


def test_centers_and_shifts_have_the_width_of_a_pixel():
    scene, observations, parameters = several_instruments()
    changed = automatic(scene, observations, parameters)
    # The model has the pixels of the fine observation.
    np.testing.assert_allclose(scale_of(changed, "sources.star.center"), 1.0, rtol=1e-6)
    np.testing.assert_allclose(scale_of(changed, "observations.coarse.astrometry.shift"), 0.25, rtol=1e-6)
    by_angle = parameters.prior("sources.star.center", dist.Normal(scene.sources["star"].center, 0.1 * u.arcsec))
    # 1e-5: pixel scales are those at the reference point.
    np.testing.assert_allclose(scale_of(by_angle, "sources.star.center"), 1.0, rtol=1e-5)
    halved = Frame.from_observations(observations, pixel_scale=0.05)
    again = automatic(Scene(halved, {"star": scene.sources["star"]}), observations)
    np.testing.assert_allclose(scale_of(again, "sources.star.center"), 2.0, rtol=1e-5)


def test_a_flux_is_as_wide_as_start_or_light():
    truth = field([FIELD["star"]])
    obs = observe(truth)
    error = np.sqrt(4 * np.pi) * PSF_SIGMA
    widths = {}
    for flux in (0.0, 1.0, 900.0, 5000.0):
        scene = field([Source((14, 56), [flux], PointMorphology())])
        changed = automatic(scene, obs)
        assert location_of(changed, FLUX) == flux
        widths[flux] = float(scale_of(changed, FLUX)[0])
    # 10 %: of the flux in an aperture, whose noise is 2 %, and which may lack the outermost percents.
    assert widths[0.0] == widths[1.0] == widths[900.0] == pytest.approx(900 + 5 * error, rel=0.1)
    assert widths[5000.0] == 5000
    nowhere = field([Source((50, 20), [1.0], PointMorphology())])
    # 10 %: the scatter of a pixel is measured on a few thousand.
    assert scale_of(automatic(nowhere, obs), FLUX) == pytest.approx(5 * error, rel=0.1)
    wide = field([Source((50, 20), [1.0], GaussianMorphology(6.0))])
    widening = np.hypot(1, 6 / np.sqrt(2 * np.log(2)) / PSF_SIGMA)
    assert scale_of(automatic(wide, obs), FLUX) == pytest.approx(5 * error * widening, rel=0.1)


def test_light_belongs_to_the_nearest_source():
    bright, faint = Source((36, 36), [1e5], GaussianMorphology(3.0)), Source((36, 60), [1.0], PointMorphology())
    truth = field({"bright": bright, "faint": Source((36, 60), [100.0], PointMorphology())})
    scene = field({"bright": bright, "faint": faint})
    changed = automatic(scene, observe(truth))
    # Ten times the faint one's flux at most; the bright one has a thousand.
    assert 100 < scale_of(changed, "sources.faint.spectrum.flux") < 1000
    # The two parts of one light share it.
    twin = field(
        {
            "bright": Source((36, 36), [1.0], GaussianMorphology(3.0)),
            "same": Source((36.5, 36), [1.0], PointMorphology()),
        }
    )
    changed = automatic(twin, observe(truth))
    for name in twin.sources:
        assert scale_of(changed, f"sources.{name}.spectrum.flux") > 9e4


def test_light_is_looked_for_where_the_shift_puts_it():
    truth = field([Source((36, 36), [900.0], PointMorphology())])
    data = np.roll(observe(truth).data, (0, 10, -6), axis=(0, 1, 2))
    obs = Observation(data, sigma=1.0, psf=GaussianPSF(PSF_SIGMA), channels=("g",), name="obs")
    scene = crude(truth, (0, 0))
    # Without a WCS a shift is (x, y) in pixels.
    widths = [float(scale_of(automatic(scene, obs.with_shift(shift)), FLUX)[0]) for shift in ((0, 0), (-6, 10))]
    assert widths[0] < 100
    assert widths[1] > 850


def test_channels_without_data():
    """Their fluxes have the width of the least sure of the others, their background is where it starts."""
    truth = field([Source((36, 36), [900.0, 900.0], PointMorphology())], channels=("g", "r"))
    obs = observe(truth)
    dark = Observation(
        obs.data,
        weights=np.array([1.0, 0.0])[:, None, None] * np.ones(obs.shape),
        psf=obs.psf,
        channels=obs.channels,
        name="obs",
        background=[0.0, 3.0],
    )
    scene = crude(truth)
    changed = automatic(scene, dark, with_sky(Parameters.default(scene, [dark])))
    widths = scale_of(changed, FLUX)
    # 10 %: as above.
    assert widths[1] == pytest.approx(5 * np.sqrt(4 * np.pi) * PSF_SIGMA, rel=0.1)
    assert widths[0] > 850
    assert location_of(changed, BACKGROUND)[1] == 3
    assert scale_of(changed, BACKGROUND)[1] == 2


def test_fluxes_that_are_shared_or_never_seen():
    channels = (("i", 1), ("i", 2))
    frame = Frame(SHAPE, channels=channels)
    transient = Source((20, 20), TransientSpectrum([700.0, 0.0], epochs=[1]), PointMorphology())
    host = Source((50, 50), StaticSpectrum([1.0], ["i"]), PointMorphology())
    truth = Scene(frame, {"transient": transient, "host": Source((50, 50), [300.0, 900.0], PointMorphology())})
    scene = Scene(frame, {"transient": transient, "host": host})
    changed = automatic(scene, observe(truth))
    # 10 %: as above. The larger one of the epochs counts.
    error = 5 * np.sqrt(4 * np.pi) * PSF_SIGMA
    np.testing.assert_allclose(scale_of(changed, "sources.host.spectrum.flux"), [900 + error], rtol=0.1)
    np.testing.assert_allclose(scale_of(changed, "sources.transient.spectrum.flux"), [700 + error, error], rtol=0.1)


@pytest.mark.parametrize("fraction", [0.0, 0.02])
def test_the_background_is_that_of_clean_pixels(fraction, rng):
    scene = field([FIELD["faint"]])
    obs = observe(scene, sky=SKY, slope=SLOPE)
    data = obs.data + np.where(rng.random(obs.shape) < fraction, 500.0, 0.0)
    spoilt = Observation(data, sigma=1.0, psf=obs.psf, channels=("g",), name="obs")
    changed = automatic(scene, spoilt, with_sky(Parameters.default(scene, [spoilt])))
    count = 0.5 * SHAPE[0] * SHAPE[1]
    # 2 to 10 standard errors wide: the errors of differences between parts of the pixels are in it.
    assert 2 / np.sqrt(count) < scale_of(changed, BACKGROUND) < 10 / np.sqrt(count)
    assert abs(location_of(changed, BACKGROUND) - SKY) < 4 / np.sqrt(count)
    extent = SHAPE[0] / np.sqrt(12)
    # 0.5 to 2: the far pixels are those around the source, so that their extent isn't quite that of the image.
    ratio = scale_of(changed, BACKGROUND_SLOPE) / scale_of(changed, BACKGROUND) * extent
    assert (ratio > 0.5).all()
    assert (ratio < 2).all()
    np.testing.assert_allclose(location_of(changed, BACKGROUND_SLOPE)[0], SLOPE, atol=4 / np.sqrt(count) / extent)


def test_wings_make_the_background_uncertain():
    widths = []
    for index in (1.0, 5.0):
        scene = field([Source((36, 36), [30000.0], SersicMorphology(6.0, index))])
        obs = observe(scene)
        widths.append(float(scale_of(automatic(scene, obs, with_sky(Parameters.default(scene, [obs]))), BACKGROUND)[0]))
    # Those of the second are brighter than the noise everywhere.
    assert widths[1] > 5 * widths[0]


def test_a_fixed_sky_is_the_one_that_is_taken_off():
    """With a background 12 too low, the model has to put the sky into the sources."""
    truth = field([FIELD["star"]])
    obs = observe(truth, sky=SKY)
    free = automatic(truth, obs, Parameters.default(truth, [obs]).free(BACKGROUND))
    assert scale_of(automatic(truth, obs), FLUX) > 10 * scale_of(free, FLUX)
    known = obs.with_background(SKY)
    assert scale_of(automatic(truth, known), FLUX) == pytest.approx(scale_of(free, FLUX), rel=0.1)  # noise of the sky


def test_a_slope_that_is_fixed_stays():
    scene = field([FIELD["star"]])
    obs = observe(scene, sky=SKY, slope=SLOPE).with_background(0.0, SLOPE)
    parameters = Parameters.default(scene, [obs]).free(BACKGROUND)
    # 0.1: as above.
    assert location_of(automatic(scene, obs, parameters), BACKGROUND) == pytest.approx(SKY, abs=0.1)


def test_counts_have_a_sky_too(rng):
    scene = field([Source((36, 36), [400.0], GaussianMorphology(3.0))])
    expected = observe(scene, sigma=1e-6, sky=0.7).data
    counts = rng.poisson(expected).astype(float)
    obs = Observation(counts, noise=PoissonNoise(counts), psf=GaussianPSF(PSF_SIGMA), channels=("g",), name="obs")
    obs = obs.with_background(0.5)
    changed = automatic(scene, obs, Parameters.default(scene, [obs]).free(BACKGROUND))
    assert deviations(changed, {BACKGROUND: [0.7]})[BACKGROUND] < 3


def test_noise_is_as_wide_as_the_scatter_of_the_sky():
    scene = field([FIELD["star"]])
    for sigma in (0.1, 4.0):
        data = observe(scene, sigma=sigma).data
        obs = Observation(
            data, noise=FloorNoise(np.ones(data.shape), 0.2), psf=GaussianPSF(PSF_SIGMA), channels=("g",), name="obs"
        )
        path = "observations.obs.noise.floor"
        changed = automatic(scene, obs, Parameters.default(scene, [obs]).free(BACKGROUND_SLOPE))
        # 10 %: of a few thousand pixels, clipped at three standard deviations. The noise level includes the floor.
        assert scale_of(changed, path) == pytest.approx(max(sigma, np.hypot(1, 0.2)), rel=0.1)
        assert location_of(changed, path) == 0
        assert changed[path].prior.support.lower_bound == 0


def test_few_pixels_and_no_noise():
    scene = Scene(Frame((9, 9), channels="g"), [Source((4, 4), [5.0], PointMorphology())])
    kind = {"psf": GaussianPSF(PSF_SIGMA), "channels": ("g",), "name": "obs", "sigma": 2.0}
    mask = np.arange(81).reshape(9, 9) > 12
    for obs in (Observation(np.zeros((9, 9)), mask=mask, **kind), Observation(np.full((9, 9), 7.0), **kind)):
        changed = automatic(scene, obs, with_sky(Parameters.default(scene, [obs])))
        for p in changed:
            assert not p.free or np.asarray(p.prior.variance).min() > 0


def test_no_source_at_all():
    scene = field({})
    obs = observe(scene, sky=SKY, slope=SLOPE)
    changed = automatic(scene, obs, with_sky(Parameters.default(scene, [obs])))
    assert max(deviations(changed, values_of(scene, obs.with_background(SKY, SLOPE))).values()) < 3


def test_sources_beside_the_images():
    scene, observations, _ = several_instruments()
    outside = Scene(scene.frame, {"a": Source((-500.0, 900.0), [1.0, 1.0, 1.0], GaussianMorphology(2.0))})
    changed = automatic(outside, observations)
    # Five errors of a Gaussian of that size in the noise of the data, of unit variance.
    assert (scale_of(changed, "sources.a.spectrum.flux") > 5).all()


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_all_widths_are_multiplied(scale):
    scene, observations, parameters = several_instruments()
    plain, changed = (automatic(scene, observations, parameters, scale=s) for s in (1.0, scale))
    kept = {"sersic_index", "amplitudes", "image"}
    for p in plain:
        if p.free and p.path.split(".")[-1] not in kept:
            np.testing.assert_allclose(scale_of(changed, p.path), scale * scale_of(plain, p.path), rtol=1e-12)
            np.testing.assert_array_equal(location_of(changed, p.path), location_of(plain, p.path))


def test_priors_survive_a_file(tmp_path):
    truth = field([FIELD["bright"]])
    obs = observe(truth)
    result = fit(
        truth, obs, automatic(truth, obs, with_sky(Parameters.default(truth, [obs]))), progress=False, max_steps=1
    )
    sf.save(tmp_path / "fit.asdf", result)
    loaded = sf.load(tmp_path / "fit.asdf").parameters
    assert eqx.tree_equal(loaded.table, result.parameters.table)


# ---- errors


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_makes_no_sense(scale):
    scene = field()
    with pytest.raises(ValueError, match=r"scale= multiplies the widths .* must be positive and finite; got"):
        automatic(scene, observe(scene), scale=scale)


def test_no_observations():
    with pytest.raises(ValueError, match="give at least one observation"):
        automatic(field(), [])


def test_parameters_of_another_scene():
    scene = field()
    obs = observe(scene)
    other = Parameters.default(scene.without("star"), [obs])
    for function in (automatic, check_start):
        with pytest.raises(
            ValueError, match=r"those of another scene .*: 2 are missing, .* such as sources\.star\.center"
        ):
            function(scene, [obs], other)


def test_no_rule_for_a_range_that_is_open():
    scene = field([FIELD["bright"]])
    obs = observe(scene)
    path = "sources.0.morphology.sersic_index"
    parameters = Parameters.default(scene, [obs]).constrain(path, constraints.positive)
    with pytest.raises(
        ValueError, match=r"no rule for the prior of sources\.0\.morphology\.sersic_index .*parameters\.prior\("
    ):
        automatic(scene, [obs], parameters)
    informed = parameters.prior(path, dist.LogNormal(0.5, 0.5))
    assert automatic(scene, [obs], informed)[path].prior is informed[path].prior


@pytest.mark.parametrize(
    ("path", "prior", "message"),
    [
        (
            RADIUS,
            dist.Uniform(6.0, 9.0),
            r"half_light_radius starts at 5\., .* no density: Uniform\(low=6\., high=9\.\)",
        ),
        (
            FLUX,
            dist.TruncatedNormal(1.0, 1.0, high=100.0),
            r"flux starts at \[20000\.\].*\(Normal\(loc=1\., scale=1\.\)",
        ),
        ("sources.0.center", dist.Beta(2.0, 2.0), r"center starts at \[20\. 22\.\].*Beta\("),
        ("sources.0.center", dist.Uniform(0.0, 21.0).expand([2]).to_event(1), r"center starts at \[20\. 22\.\]"),
    ],
)
def test_a_prior_that_excludes_the_start(path, prior, message):
    scene = field([FIELD["bright"]])
    obs = observe(scene)
    parameters = Parameters.default(scene, [obs]).prior(path, prior)
    for function in (automatic, check_start):
        with pytest.raises(ValueError, match=message):
            function(scene, [obs], parameters)
    # What is fixed doesn't start anywhere.
    check_start(scene, [obs], parameters.fix(path))


def test_starts_on_a_bound_or_nowhere():
    lowest = [Source((20, 22), [0.0], SersicMorphology(2.0, 0.4))]
    scene = field(lowest)
    obs = observe(scene)
    parameters = automatic(scene, [obs])
    check_start(scene, obs, parameters)
    bad = field([Source((20, 22), [np.nan], SersicMorphology(2.0, 0.4))])
    with pytest.raises(ValueError, match=r"spectrum\.flux starts at \[nan\], where its prior has no density"):
        check_start(bad, [obs], parameters)
    with pytest.raises(ValueError, match=r"spectrum\.flux starts at \[nan\]; a prior wants a finite start"):
        automatic(bad, [obs])
    # A log-normal has no density at 0.
    with pytest.raises(ValueError, match=r"spectrum\.flux starts at \[0\.\].*LogNormal\("):
        check_start(scene, [obs], parameters.prior(FLUX, dist.LogNormal(0.0, 1.0)))


def test_a_tied_parameter_starts_with_the_other():
    sources = {name: FIELD[name] for name in ("bright", "neighbour")}
    scene = field(sources)
    obs = observe(scene)
    paths = [f"sources.{name}.morphology.half_light_radius" for name in sources]
    prior = dist.Uniform(1.0, 3.0)
    parameters = Parameters.default(scene, [obs]).tie(*paths)
    with pytest.raises(ValueError, match=r"neighbour\.morphology\.half_light_radius starts at 5\."):
        check_start(scene, [obs], parameters.prior(paths[1], prior))


def test_it_is_in_the_package():
    assert sf.priors.automatic is automatic
    assert sf.priors.check_start is check_start
