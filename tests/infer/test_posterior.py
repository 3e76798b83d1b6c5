import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro.distributions import constraints

from scenefit.data.noise import FloorNoise
from scenefit.infer import posterior
from scenefit.infer.problem import Problem, State, smooth_range, unconstrained
from scenefit.model.morphology import GaussianMorphology, PixelMorphology, PointMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from tests.blends import (
    CHANNELS,
    COARSE_PSF,
    COARSE_ROTATION,
    COARSE_SCALE,
    COARSE_SHAPE,
    FINE_PSF,
    FINE_SCALE,
    FINE_SHAPE,
    GALAXIES,
    chi_square,
    draw,
    observe,
    rough_scene,
    true_scene,
)
from tests.blends import frame_of as make_frame
from tests.helpers import compiled_for

SHIFT, BACKGROUND, SLOPE = (0.03, -0.05), 0.7, [(0.02, -0.01), (0.0, 0.03)]
evaluate_loss = eqx.filter_jit(Problem.loss)


def everything_free(scene, observations):
    """Free all parameters but the shift of the fine image and the centers of images, which their pixels stand for."""
    parameters = Parameters.default(scene, observations).free("observations.*.background")
    parameters = parameters.free("observations.*.background_slope")
    return parameters.free("observations.coarse.astrometry.shift")


def mixed_scene(frame):
    """One source of every kind."""
    rng = np.random.default_rng(6)
    smooth = np.outer(np.hanning(11), np.hanning(11))[1:-1, 1:-1]
    pair = CompositeSource(
        {
            "host": Source((14.2, 17.5), [300.0, 200.0, 400.0], GaussianMorphology(2.6, (0.2, -0.1))),
            "nucleus": Source((14.2, 17.5), [50.0, 60.0, 40.0], PointMorphology()),
        }
    )
    clumpy = PixelMorphology(smooth * rng.uniform(0.5, 1.5, smooth.shape), envelope=smooth)
    return Scene(
        frame,
        {
            "pair": pair,
            "clumpy": Source((27.0, 26.0), [200.0, 100.0, 150.0], clumpy),
            "galaxy": Source((10.3, 29.0), [90.0, 70.0, 80.0], GaussianMorphology(1.7)),
        },
    )


@pytest.fixture(scope="module")
def frame():
    return make_frame()


@pytest.fixture(scope="module")
def observations(frame):
    fine, coarse = observe()
    return [fine.match(frame), coarse.with_shift(SHIFT).with_background(BACKGROUND).match(frame)]


@pytest.fixture(scope="module")
def mixed(frame, observations):
    """(problem, state, layout) of a scene of all kinds with everything free."""
    scene = mixed_scene(frame)
    return posterior.build(scene, observations, everything_free(scene, observations))


def drawn(shift=(0.0, 0.0), background=0.0):
    """Analytic images of the true blend."""
    settings = {
        "fine": (FINE_SHAPE, FINE_SCALE, FINE_PSF, 0.0, (0.0, 0.0)),
        "coarse": (COARSE_SHAPE, COARSE_SCALE, COARSE_PSF, COARSE_ROTATION, shift),
    }
    result = []
    for name, setting in settings.items():
        planes = [sum(draw(g, c, *setting) for g in GALAXIES.values()) for c in CHANNELS[name]]
        result.append(np.array(planes) + background * (name == "coarse"))
    return result


# ---- values


def test_the_loss_is_half_the_chi_square_of_the_true_model(frame, observations):
    problem, state, _ = posterior.build(
        true_scene(frame), observations, Parameters.default(true_scene(frame), observations)
    )
    expected = 0.0
    for obs, image in zip(observations, drawn(SHIFT, BACKGROUND), strict=True):
        window = (slice(None), *obs.renderer.window.slices)
        residual = (obs.data - image)[window][:, obs.renderer.inside]
        expected += 0.5 * np.sum(residual**2)
    # 1e-4: 2112 residuals of about 1, each off by less than 2e-4 of their standard deviation (float32 of peaks of 70,
    # interpolation), with random signs.
    assert float(evaluate_loss(problem, state)) == pytest.approx(expected, rel=1e-4)


def test_the_loss_agrees_with_the_observations(frame, observations):
    scene = mixed_scene(frame).without("clumpy")
    problem, state, _ = posterior.build(scene, observations, Parameters.default(scene, observations))
    expected = 0.5 * chi_square(scene, observations)
    # 1e-5: residuals of 1 with a rounding error of 1e-6 of peaks of 20, random signs.
    assert float(evaluate_loss(problem, state)) == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_minus_the_log_likelihood(frame, observations):
    """Up to a constant: between two scenes."""
    scene = mixed_scene(frame).without("clumpy")
    problem, state, layout = posterior.build(scene, observations, Parameters.default(scene, observations))
    changed = eqx.tree_at(lambda s: s.vector, state, state.vector * 1.01)
    other, moved = posterior.unpack(problem, changed, layout, scene, observations)
    difference = float(evaluate_loss(problem, changed)) - float(evaluate_loss(problem, state))
    expected = sum(obs.log_likelihood(scene) for obs in observations) - sum(obs.log_likelihood(other) for obs in moved)
    assert abs(expected) > 10
    # 0.02: difference of two numbers of 1e4 to 1e5, rounded in float32.
    assert difference == pytest.approx(expected, abs=0.02)


def test_pixels_off_the_frame_and_invalid_ones_do_not_count(frame):
    small = type(frame)((24, 30), channels=frame.channels, wcs=frame.wcs, padding=frame.padding)
    scene = Scene(small, {"a": Source((12, 13), [100.0, 100.0, 100.0], GaussianMorphology(1.5))})
    fine, coarse = observe()
    fine = type(fine)(
        fine.data,
        weights=np.random.default_rng(1).uniform(0.5, 2, fine.shape) * (np.arange(40) != 12),
        psf=fine.psf,
        wcs=fine.wcs,
        channels=fine.channels,
        name="fine",
    )
    observations = [obs.match(small) for obs in (fine, coarse)]
    problem, state, _ = posterior.build(scene, observations, Parameters.default(scene, observations))
    expected = 0.5 * chi_square(scene, observations)
    # 1e-5: as above.
    assert float(evaluate_loss(problem, state)) == pytest.approx(expected, rel=1e-5)
    bad = fine.data.copy()
    bad[:, :, 12], bad[:, 24:], bad[:, :, 30:] = 1e3, 1e3, -1e3
    spoilt = [eqx.tree_at(lambda o: o.data, observations[0], bad), observations[1]]
    other, _, _ = posterior.build(scene, spoilt, Parameters.default(scene, spoilt))
    np.testing.assert_array_equal(evaluate_loss(other, state), evaluate_loss(problem, state))


def test_priors_enter_the_loss(frame, observations):
    scene = mixed_scene(frame)
    plain = Parameters.default(scene, observations)
    flat = plain.prior("sources.clumpy.morphology.image", None)
    pixels = plain["sources.clumpy.morphology.image"].prior
    size, flux = "sources.galaxy.morphology.half_light_radius", "sources.galaxy.spectrum.flux"
    informed = plain.prior(size, dist.TruncatedNormal(1.2, 0.3, low=0.1)).prior(flux, dist.Normal(60, 9))
    losses = []
    for parameters in (flat, plain, informed):
        problem, state, _ = posterior.build(scene, observations, parameters)
        losses.append(float(evaluate_loss(problem, state)))
    image = scene.sources["clumpy"].morphology.image
    expected = 0.5 * np.sum(((image - np.asarray(pixels.loc)) / np.asarray(pixels.scale)) ** 2)
    # 1e-2: difference of two numbers of about 3e3, rounded to 2e-4 relative to float32's 1e-7 times terms summed.
    assert losses[1] - losses[0] == pytest.approx(expected, abs=1e-2)
    log_prior = scipy.stats.truncnorm.logpdf(1.7, (0.1 - 1.2) / 0.3, np.inf, 1.2, 0.3)
    log_prior += scipy.stats.norm.logpdf([90, 70, 80], 60, 9).sum()
    assert losses[1] - losses[2] == pytest.approx(log_prior, abs=1e-2)


def prior_of(name, location):
    """Return a prior (numpyro) and its log-density (scipy, summed over the entries of a value)."""
    priors = {
        "normal": (dist.Normal(location, 0.7), scipy.stats.norm(location, 0.7)),
        "above": (
            dist.TruncatedNormal(location, 1.0, low=0.2),
            scipy.stats.truncnorm(0.2 - location, np.inf, location),
        ),
        "between": (
            dist.TruncatedNormal(location, 1.0, low=0.2, high=9),
            scipy.stats.truncnorm(0.2 - location, 9 - location, location),
        ),
        "log-normal": (dist.LogNormal(0.1 * location, 0.6), scipy.stats.lognorm(0.6, scale=np.exp(0.1 * location))),
        "transformed": (
            dist.TransformedDistribution(dist.StudentT(3.0), dist.transforms.AffineTransform(location, 2.0)),
            scipy.stats.t(3, location, 2.0),
        ),
        "mixture": (
            dist.MixtureSameFamily(dist.Categorical(np.full(2, 0.5)), dist.Laplace(np.full(2, location), 1.5)),
            scipy.stats.laplace(location, 1.5),
        ),
    }
    prior, reference = priors[name]
    return prior, lambda value: reference.logpdf(value).sum()


def with_priors(scene, observations, names):
    """Return parameters with a prior on every size and flux, of kinds `names` in turn, and the log-density of all."""
    parameters, expected = Parameters.default(scene, observations), 0.0
    for number, (path, component) in enumerate(scene.components()):
        prior, log_density = prior_of(names[number % len(names)], 1.5 + 0.1 * number)
        for suffix, value in (
            ("morphology.half_light_radius", component.morphology.half_light_radius),
            ("spectrum.flux", component.spectrum.flux),
        ):
            parameters = parameters.prior(f"{path}.{suffix}", prior)
            expected += log_density(np.asarray(value, float))
    return parameters, expected


def test_the_order_in_which_numpyro_lists_parameters_does_not_matter(frame, observations, monkeypatch):
    """It is that of a set, another one in every process."""
    scene = row_of_sources(frame, 3)
    parameters, expected = with_priors(scene, observations, ["above"])
    listed = dist.Distribution.gather_pytree_data_fields.__func__
    found = []
    for step in (1, -1):
        names = classmethod(lambda cls, step=step: tuple(sorted(listed(cls)))[::step])
        monkeypatch.setattr(dist.Distribution, "gather_pytree_data_fields", names)
        problem, state, _ = posterior.build(scene, observations, parameters)
        assert float(problem.log_prior(state.vector)) == pytest.approx(expected, rel=1e-5)
        found.append([[np.asarray(leaf) for leaf in priors.leaves] for priors in problem.priors])
    for first, second in zip(*found, strict=True):
        for one, other in zip(first, second, strict=True):
            np.testing.assert_array_equal(one, other)


def row_of_sources(frame, count):
    """Faint sources of one kind, in a row."""
    sources = [
        Source((20.0, 6.0 + 5 * n), [3.0 + n, 2.0, 2.5], GaussianMorphology(1.2 + 0.1 * n)) for n in range(count)
    ]
    return Scene(frame, {str(n): source for n, source in enumerate(sources)})


@pytest.mark.parametrize("name", ["normal", "above", "between", "log-normal", "transformed", "mixture"])
@pytest.mark.parametrize("count", [1, 5])
def test_priors_of_one_kind(frame, observations, name, count):
    scene = row_of_sources(frame, count)
    parameters, expected = with_priors(scene, observations, [name])
    problem, state, _ = posterior.build(scene, observations, parameters)
    # Fluxes have three entries, sizes one.
    assert len(problem.priors) == 2
    # 1e-5: single precision.
    assert float(problem.log_prior(state.vector)) == pytest.approx(expected, rel=1e-5)


def test_priors_of_many_kinds_and_shapes(frame, observations):
    scene = row_of_sources(frame, 6)
    parameters, expected = with_priors(scene, observations, ["normal", "log-normal", "above", "normal"])
    fluxes, center, shift = np.array([2.0, 1.0, 3.0]), np.array([19.0, 7.0]), np.array([0.1, -0.2])
    covariance = np.array([[2.0, 0.5], [0.5, 1.0]])
    parameters = parameters.prior("sources.0.spectrum.flux", dist.Normal(fluxes, 0.9))
    parameters = parameters.prior("sources.1.spectrum.flux", dist.Normal(3.0, fluxes))
    parameters = parameters.prior("sources.2.center", dist.MultivariateNormal(center, covariance))
    parameters = parameters.prior("sources.3.center", dist.Uniform(0.0, 40.0).expand([2]).to_event(1))
    parameters = parameters.free("observations.coarse.astrometry.shift", prior=dist.Normal(shift, 0.3))
    # The fluxes of sources 0 and 1 had a normal and a log-normal prior.
    for number, new in ((0, scipy.stats.norm(fluxes, 0.9)), (1, scipy.stats.norm(3.0, fluxes))):
        value = scene.sources[str(number)].spectrum.flux
        _, old = prior_of(["normal", "log-normal"][number], 1.5 + 0.1 * number)
        expected += new.logpdf(value).sum() - old(value)
    expected += scipy.stats.multivariate_normal(center, covariance).logpdf(scene.sources["2"].center)
    expected += 2 * np.log(1 / 40) + scipy.stats.norm(shift, 0.3).logpdf(SHIFT).sum()
    problem, state, _ = posterior.build(scene, observations, parameters)
    # 1e-5: single precision.
    assert float(problem.log_prior(state.vector)) == pytest.approx(expected, rel=1e-5)


def test_more_sources_with_priors_compile_nothing(frame, observations):
    """Five and six sources are both padded to six."""
    traces, kinds = [], set()

    @eqx.filter_jit
    def counted(problem, vector):
        traces.append(1)
        return problem.log_prior(vector)

    for count in (5, 6):
        scene = row_of_sources(frame, count)
        parameters, expected = with_priors(scene, observations, ["between"])
        problem, state, _ = posterior.build(scene, observations, parameters)
        kinds.add(compiled_for(problem))
        # 1e-5: single precision.
        assert float(counted(problem, state.vector)) == pytest.approx(expected, rel=1e-5)
    assert len(traces) == len(kinds) == 1


def test_the_order_of_priors_compiles_nothing(frame, observations):
    scene = row_of_sources(frame, 2)
    kinds = set()
    for names in (["normal", "above"], ["above", "normal"]):
        problem, _, _ = posterior.build(scene, observations, with_priors(scene, observations, names)[0])
        kinds.add(compiled_for(problem))
    assert len(kinds) == 1


def test_the_program_does_not_grow_with_the_number_of_priors(frame, observations):
    lengths = []
    for count in (2, 6):
        scene = row_of_sources(frame, count)
        parameters, _ = with_priors(scene, observations, ["above"])
        problem, state, _ = posterior.build(scene, observations, parameters)
        lengths.append(len(str(jax.make_jaxpr(problem.log_prior)(state.vector)).splitlines()))
    assert lengths[0] == lengths[1]


# ---- round trips


def test_build_and_unpack_are_a_round_trip(frame, observations, mixed, eps):
    scene = mixed_scene(frame)
    again, moved = posterior.unpack(*mixed, scene, observations)
    assert list(again.sources) == list(scene.sources)
    for (path, old), (new_path, new) in zip(scene.components(), again.components(), strict=True):
        assert path == new_path
        # 20 eps: single precision of the packed arrays, and maps to coordinates and back.
        np.testing.assert_allclose(new.center, old.center, rtol=20 * eps)
        np.testing.assert_allclose(new.spectrum.flux, old.spectrum.flux, rtol=20 * eps)
        assert type(new.morphology) is type(old.morphology)
        for name in old.morphology.constraints:
            np.testing.assert_allclose(
                getattr(new.morphology, name), getattr(old.morphology, name), rtol=20 * eps, atol=eps
            )
    clumpy = again.sources["clumpy"].morphology
    # 1e-15: scaled to unit sum once more.
    np.testing.assert_allclose(clumpy.envelope, scene.sources["clumpy"].morphology.envelope, rtol=1e-15)
    assert clumpy.anchor == scene.sources["clumpy"].morphology.anchor
    for old, new in zip(observations, moved, strict=True):
        np.testing.assert_allclose(new.astrometry.shift, old.astrometry.shift, rtol=20 * eps)
        np.testing.assert_allclose(new.background, old.background, rtol=20 * eps)


@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e10])
def test_slopes_and_floors_arrive_in_data_units(frame, factor, eps):
    fine, coarse = observe(scale=factor)
    noise, slope = FloorNoise(coarse.noise.weights, factor * np.array([0.4, 0.7])), factor * np.array(SLOPE)
    observations = [obs.match(frame) for obs in (fine, coarse.with_noise(noise).with_background(0.0, slope))]
    scene = rough_scene(frame, scale=factor)
    problem, state, layout = posterior.build(scene, observations, everything_free(scene, observations))
    _, (_, again) = posterior.unpack(problem, state, layout, scene, observations)
    # 20 eps: single precision of the packed arrays, and a logarithm and back.
    np.testing.assert_allclose(again.background_slope, slope, rtol=20 * eps)
    np.testing.assert_allclose(again.noise.floor, noise.floor, rtol=20 * eps)
    (leaf,) = (leaf for leaf in problem.leaves if leaf.name == "noise.floor")
    vector = state.vector.at[leaf.start : leaf.stop].add(jnp.log(2.0))
    _, (_, twice) = posterior.unpack(problem, State(vector, state.images), layout, scene, observations)
    np.testing.assert_allclose(twice.noise.floor, 2 * noise.floor, rtol=20 * eps)
    # What has no floor is left alone.
    np.testing.assert_array_equal(twice.noise.weights, coarse.noise.weights)


def test_parts_keep_their_order(frame, observations):
    parts = {name: Source((20.0, 20.0), [1.0, 1.0, 1.0], PointMorphology()) for name in ("nucleus", "disk")}
    scene = Scene(frame, {"z": CompositeSource(parts), "a": parts["disk"]})
    built = posterior.build(scene, observations, Parameters.default(scene, observations))
    again, _ = posterior.unpack(*built, scene, observations)
    assert [path for path, _ in again.components()] == [path for path, _ in scene.components()]


def test_what_a_state_says_arrives_in_the_scene(frame, observations, mixed, eps):
    """Twice the image is the same one; a coordinate more is a pixel, an arcsec, a flux unit more."""
    problem, state, layout = mixed
    scene = mixed_scene(frame)
    vector = np.asarray(state.vector).copy()
    leaf = next(leaf for leaf in problem.leaves if leaf.kind == "image" and leaf.name == "shift" and leaf.number == 1)
    vector[leaf.start : leaf.stop] += [0.25, -0.5]
    changed = State(jnp.asarray(vector), tuple(2 * image for image in state.images))
    again, moved = posterior.unpack(problem, changed, layout, scene, observations)
    # 20 eps: rounding, as above.
    np.testing.assert_allclose(moved[1].astrometry.shift, np.add(SHIFT, [0.25, -0.5]), rtol=20 * eps)
    old, new = scene.sources["clumpy"], again.sources["clumpy"]
    np.testing.assert_allclose(new.spectrum.flux, old.spectrum.flux, rtol=20 * eps)
    np.testing.assert_allclose(new.morphology.image, old.morphology.image, rtol=20 * eps, atol=eps)


def test_a_dark_image_has_no_flux(frame, observations, mixed):
    problem, state, layout = mixed
    scene = mixed_scene(frame)
    dark = State(state.vector, tuple(jnp.zeros_like(image) for image in state.images))
    again, _ = posterior.unpack(problem, dark, layout, scene, observations)
    np.testing.assert_array_equal(again.sources["clumpy"].spectrum.flux, 0)
    assert np.isfinite(again.sources["clumpy"].morphology.image).all()


@pytest.mark.parametrize(
    ("low", "high", "values"),
    [
        (-np.inf, np.inf, [-3.0, 0.0, 7.0]),
        (0.0, np.inf, [1e-3, 1.0, 50.0]),
        (-np.inf, 2.0, [-30.0, 0.0, 1.99]),
        (0.3, 8.0, [0.31, 4.0, 7.9]),
    ],
)
def test_coordinates_cover_the_range(low, high, values):
    values = np.array(values)
    coordinates = unconstrained(values, np.full(3, low), np.full(3, high))
    # 1e-5: the logistic and the exponential in float32 near their ends.
    np.testing.assert_allclose(smooth_range(jnp.asarray(coordinates), low, high), values, rtol=1e-5)
    far = np.asarray(smooth_range(jnp.asarray([-100.0, 100.0]), low, high))
    assert np.isfinite(far).all()
    assert (far >= low).all()
    assert (far <= high).all()
    assert far[0] < far[1]


# ---- derivatives


@pytest.fixture(scope="module")
def precise():
    """Problem and state in double precision, off the best fit, with the gradient of the loss."""
    with jax.enable_x64(True):
        frame = make_frame()
        fine, coarse = observe()
        coarse = coarse.with_noise(FloorNoise(coarse.noise.weights, [0.4, 0.7]))
        observations = [fine.match(frame), coarse.with_shift(SHIFT).with_background(BACKGROUND, SLOPE).match(frame)]
        scene = mixed_scene(frame)
        parameters = everything_free(scene, observations)
        parameters = parameters.prior("sources.galaxy.morphology.half_light_radius", dist.Normal(1.2, 0.3))
        parameters = parameters.constrain(
            "sources.pair.parts.host.morphology.half_light_radius", constraints.interval(1, 5)
        )
        problem, state, _ = posterior.build(scene, observations, parameters)
        gradient = jax.device_get(eqx.filter_jit(jax.grad(Problem.loss, argnums=1))(problem, state))
        return problem, state, gradient


@pytest.mark.parametrize(
    "name",
    [
        "flux",
        "center",
        "morphology.half_light_radius",
        "morphology.ellipticity",
        "shift",
        "background",
        "background_slope",
        "noise.floor",
        "image pixel",
    ],
)
def test_the_gradient_equals_finite_differences(precise, name):
    problem, state, gradient = precise
    rng = np.random.default_rng(3)
    direction = jax.tree.map(np.zeros_like, jax.device_get(state))
    if name == "image pixel":
        free = np.asarray(problem.free.images[0])
        direction.images[0][free] = rng.normal(size=free.sum())
    else:
        leaves = [leaf for leaf in problem.leaves if leaf.name == name]
        assert leaves
        for leaf in leaves:
            direction.vector[leaf.start : leaf.stop] = rng.normal(size=leaf.stop - leaf.start)
    step = 1e-5 * (1e-2 if name == "image pixel" else 1.0)
    with jax.enable_x64(True):
        ahead, behind = (
            float(evaluate_loss(problem, jax.tree.map(lambda s, d, t=t: s + t * d, state, direction)))
            for t in (step, -step)
        )
    expected = (ahead - behind) / (2 * step)
    slope = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    # 1e-4: rounding, 1e-16 of a loss of 1e4 over steps of 1e-5 (1e-7) is 1e-5 (1e-3), where slopes are 10 to 1e6.
    assert slope == pytest.approx(expected, rel=1e-4)


def test_every_parameter_changes_the_log_density(precise):
    problem, _, gradient = precise
    free = jax.device_get(problem.free)
    assert (gradient.vector[free.vector] != 0).all()
    assert (gradient.images[0][free.images[0]] != 0).all()
    assert free.images[0].sum() == 81
    # A fixed parameter has no slope to follow either: padding has no coordinate that matters.
    names = {leaf.name for leaf in problem.leaves}
    shapes = {"morphology.half_light_radius", "morphology.ellipticity"}
    assert names == shapes | {"center", "flux", "shift", "background", "background_slope", "noise.floor"}


def test_fixed_parameters_are_not_free(frame, observations):
    scene = true_scene(frame)
    parameters = Parameters.default(scene, observations)
    counts = []
    for choice in (parameters, parameters.fix("sources.a.center"), parameters.fix("sources"), parameters.fix("*")):
        problem, _, _ = posterior.build(scene, observations, choice)
        counts.append(int(problem.free.vector.sum()))
    # Three sources with 2 + 3 + 1 + 2 numbers each.
    assert counts == [24, 22, 0, 0]


def test_tied_parameters_share_coordinates(frame, observations):
    scene = true_scene(frame)
    parameters = Parameters.default(scene, observations).tie("sources.a.center", "sources.b.center", "sources.c.center")
    problem, state, layout = posterior.build(scene, observations, parameters)
    # As above, less two centers.
    assert int(problem.free.vector.sum()) == 20
    moved = eqx.tree_at(lambda s: s.vector, state, jnp.where(problem.free.vector, state.vector + 0.25, state.vector))
    again, _ = posterior.unpack(problem, moved, layout, scene, observations)
    # Exact: the same coordinates.
    np.testing.assert_array_equal(again.sources["b"].center, again.sources["a"].center)
    np.testing.assert_array_equal(again.sources["c"].center, again.sources["a"].center)
    # 1e-6: rounding in float32 of positions of 20 pixels.
    np.testing.assert_allclose(again.sources["a"].center, scene.sources["a"].center + 0.25, atol=1e-5)


@pytest.mark.parametrize("first", ["sources.galaxy.center", "sources.clumpy.center"])
def test_parameters_can_be_tied_to_fixed_ones(frame, observations, first):
    """A star held on a galaxy that stays in place: one of its own kind, and an image, whose center is fixed by default."""
    scene = mixed_scene(frame)
    parameters = Parameters.default(scene, observations).fix("sources.galaxy.center").fix("sources.pair.parts.host")
    parameters = parameters.tie(first, "sources.pair.parts.nucleus.center")
    problem, state, layout = posterior.build(scene, observations, parameters)
    again, _ = posterior.unpack(problem, state, layout, scene, observations)
    nucleus = dict(again.components())["sources.pair.parts.nucleus"]
    # 1e-5: rounding in float32 of positions of 20 pixels.
    np.testing.assert_allclose(nucleus.center, scene.sources[first.split(".")[1]].center, atol=1e-5)


# ---- errors


def test_observations_must_be_matched(frame):
    scene = true_scene(frame)
    observations = observe()
    with pytest.raises(ValueError, match=r"fine isn't matched to the frame: use obs.match\(frame\)"):
        posterior.build(scene, observations, Parameters.default(scene, observations))


@pytest.mark.parametrize(
    ("path", "constraint"),
    [
        ("sources.a.spectrum.flux", constraints.greater_than(1e6)),
        ("sources.a.morphology.half_light_radius", constraints.interval(0.1, 0.5)),
        ("sources.a.center", constraints.less_than(1.0)),
    ],
)
def test_a_start_out_of_its_range(frame, observations, path, constraint):
    scene = true_scene(frame)
    parameters = Parameters.default(scene, observations).constrain(path, constraint)
    with pytest.raises(ValueError, match=rf"{path} must start within .*; got"):
        posterior.build(scene, observations, parameters)


def test_a_constraint_that_is_no_range(frame, observations):
    scene = true_scene(frame)
    parameters = Parameters.default(scene, observations).constrain("sources.a.spectrum.flux", constraints.simplex)
    with pytest.raises(ValueError, match="isn't a range of numbers; use an interval or 'real'"):
        posterior.build(scene, observations, parameters)


def test_the_prior_of_an_image_is_normal(frame, observations):
    scene = mixed_scene(frame)
    parameters = Parameters.default(scene, observations).prior("sources.clumpy.morphology.image", dist.HalfNormal(1.0))
    with pytest.raises(ValueError, match="the prior of an image must be Normal; got"):
        posterior.build(scene, observations, parameters)


def test_a_range_bounds_fluxes_and_positions(frame, observations):
    scene = rough_scene(frame)
    flux, center = "sources.a.spectrum.flux", "sources.b.center"
    parameters = Parameters.default(scene, observations).constrain(flux, constraints.interval(10, 2000))
    parameters = parameters.constrain(center, constraints.interval(1, 30))
    problem, state, layout = posterior.build(scene, observations, parameters)
    far = jax.tree.map(lambda s: jnp.full_like(s, 1e6), state)
    again, _ = posterior.unpack(problem, problem.project(far), layout, scene, observations)
    # 1e-5: bounds in float32.
    np.testing.assert_allclose(again.sources["a"].spectrum.flux, 2000, rtol=1e-5)
    np.testing.assert_allclose(again.sources["b"].center, 30, rtol=1e-5)
    again, _ = posterior.unpack(problem, problem.project(jax.tree.map(lambda s: -s, far)), layout, scene, observations)
    np.testing.assert_allclose(again.sources["a"].spectrum.flux, 10, rtol=1e-5)
    np.testing.assert_array_equal(again.sources["b"].spectrum.flux, 0)
    np.testing.assert_allclose(again.sources["b"].center, 1, rtol=1e-5)
