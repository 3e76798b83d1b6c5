import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from scenefit.arrays.compilation import compiled
from scenefit.data.observation import Observation
from scenefit.infer import dense, posterior
from scenefit.infer.descent import Secant
from scenefit.infer.fit import Status, fit
from scenefit.infer.information import information
from scenefit.infer.problem import State
from scenefit.infer.slopes import blank_slopes, stamp_slopes
from scenefit.model import link
from scenefit.model.clumpy import ClumpyMorphology
from scenefit.model.morphology import GaussianMorphology, MultiGaussianMorphology, PointMorphology, SersicMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF

SHAPE, BANDS = (31, 33), ("g", "r", "i")
WAVELENGTHS = {"g": 0.48, "r": 0.62, "i": 0.77}


def make_observation(band, data=None, name=None):
    data = np.zeros(SHAPE) if data is None else data
    return Observation(data, sigma=0.01, psf=GaussianPSF(1.3), channels=[band], name=name or band)


def make_scene(scale=1.0):
    """A linked disk with a nucleus, a neighbour of rings and a star; `scale` moves it away from the truth."""
    radius = link.Polynomial([3.0 * scale, 2.5, 2.2], WAVELENGTHS)
    ellipticity = link.Polynomial([(0.2, 0.1), (0.3 * scale, 0.1)], WAVELENGTHS)
    host = CompositeSource(
        {
            "disk": Source((14.2, 13.1), [4.0, 6.0, 5.0], SersicMorphology(radius, 1.2 * scale, ellipticity)),
            "nucleus": Source((14.2, 13.1), [0.5, 0.6, 0.7], PointMorphology()),
        }
    )
    rings = MultiGaussianMorphology([0.8, 1.6, 3.2], [0.3 * scale, 0.4, 0.3], (0.0, 0.3))
    return Scene(
        Frame(SHAPE, channels=BANDS, padding=8),
        {"host": host, "rings": Source((20.5, 22.3), [3.0, 2.0, 1.0], rings)},
    )


def make_parameters(scene, observations):
    parameters = Parameters.default(scene, observations).free("observations.i.astrometry.shift")
    parameters = parameters.free("observations.*.background").free("observations.g.background_slope")
    return parameters.tie("sources.host.parts.disk.center", "sources.host.parts.nucleus.center")


def observed(noise=0.0):
    """Observations of the true scene."""
    rng, scene = np.random.default_rng(4), make_scene()
    blank = [make_observation(band).match(scene.frame) for band in BANDS]
    images = [obs.render(scene)[0] + noise * rng.normal(size=SHAPE) for obs in blank]
    return [make_observation(band, image).match(scene.frame) for band, image in zip(BANDS, images, strict=True)]


STEP = 1e-4
"""Of finite differences, in double precision."""


def finite_differences(problem, state, index):
    """Derivatives of all residuals along coordinates, shape (m, pixel), by differences."""
    residuals = compiled(lambda p, s: jnp.concatenate([r.ravel() for r in jax.tree.leaves(p.residuals(s))]))
    ends = [
        [residuals(problem, State(state.vector.at[n].add(sign * STEP), ())) for sign in (1, -1)]
        for n in np.asarray(index)
    ]
    return np.array([np.asarray(a, float) - np.asarray(b, float) for a, b in ends]) / (2 * STEP)


def test_the_information_is_that_of_finite_differences():
    with jax.enable_x64(True):
        scene, observations = make_scene(0.9), observed()
        problem, state, layout = posterior.build(scene, observations, make_parameters(scene, observations))
        where = dense.dense_footprints(problem, layout, scene, observations)
        assert where is not None
        assert sorted(np.asarray(where.index)) == sorted(np.nonzero(np.asarray(problem.free.vector))[0])
        rows = finite_differences(problem, state, where.index)
        found = np.asarray(compiled(information)(problem, state, where))
    scale = np.linalg.norm(rows, axis=1)
    # 1e-6: third derivatives times the squared step.
    np.testing.assert_allclose(found / np.outer(scale, scale), rows @ rows.T / np.outer(scale, scale), atol=1e-6)


def test_the_information_of_many_clumps():
    """More numbers than one block of slots holds, beside a source that needs one block alone."""
    rng, bands = np.random.default_rng(7), ("g", "r")
    offsets = rng.normal(scale=4.0, size=(18, 2))
    clumpy = ClumpyMorphology(3.0, 1.0, (0.2, 0.1), offsets, np.full(18, 0.02))
    sources = {
        "plain": Source((20.5, 22.3), [3.0, 2.0], SersicMorphology(2.0, 1.3, (0.1, -0.1))),
        "clumpy": Source((14.2, 13.1), [4.0, 6.0], clumpy),
    }
    with jax.enable_x64(True):
        scene = Scene(Frame(SHAPE, channels=bands, padding=8), sources)
        observations = [make_observation(band).match(scene.frame) for band in bands]
        parameters = Parameters.default(scene, observations).free("observations.r.astrometry.shift")
        problem, state, layout = posterior.build(scene, observations, parameters)
        where = dense.dense_footprints(problem, layout, scene, observations)
        assert where is not None
        assert len(np.unique(np.asarray(where.pairs[0].blocks))) > 1
        rows = finite_differences(problem, state, where.index)
        found = np.asarray(compiled(information)(problem, state, where))
    # Fluxes, centers, radii, indices, ellipticities; shares and shift of the clumps; offset.
    assert len(rows) == 2 * (2 + 2 + 1 + 1 + 2) + 18 + 2 + 2
    scale = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(found / np.outer(scale, scale), rows @ rows.T / np.outer(scale, scale), atol=1e-6)


def test_sources_far_apart_are_differentiated_together():
    """Four galaxies in a row: two colors, and only neighbours overlap."""
    shape = (40, 160)
    frame = Frame(shape, channels=["g"], padding=10)
    morphology = SersicMorphology(1.5, 1.0, (0.2, 0.1))
    sources = {str(n): Source((18.0 + n, 20.0 + 40 * n), [20.0 + n], morphology) for n in range(4)}
    scene = Scene(frame, sources)
    with jax.enable_x64(True):
        blank = Observation(np.zeros(shape), sigma=0.01, psf=GaussianPSF(1.3), channels=["g"], name="g").match(frame)
        parameters = Parameters.default(scene, [blank]).free("observations.g.background")
        problem, state, layout = posterior.build(scene, [blank], parameters)
        exact, cores = (dense.dense_footprints(problem, layout, scene, [blank], quick=c) for c in (False, True))
        assert exact is not None
        assert cores is not None
        assert int(np.max(cores.color)) + 1 == 2
        pairs = np.asarray(cores.pairs[0].members)[: int(cores.pairs[0].count)]
        assert len(np.unique(pairs, axis=0)) == 4 + 3
        rows = finite_differences(problem, state, exact.index)
        found, approximate = (np.asarray(compiled(information)(problem, state, where)) for where in (exact, cores))
    scale, expected = np.linalg.norm(rows, axis=1), rows @ rows.T
    # 2e-4: beyond its extent a PSF is below 1e-4 of its peak.
    np.testing.assert_allclose(found / np.outer(scale, scale), expected / np.outer(scale, scale), atol=2e-4)
    lost = np.linalg.eigvalsh((expected - approximate) / np.outer(scale, scale))
    # What the outskirts add to the information is positive, and little.
    assert lost.min() > -1e-3
    assert lost.max() < 0.05


def test_both_methods_end_at_the_same_minimum():
    scene, observations = make_scene(1.1), observed(0.01)
    parameters = make_parameters(scene, observations)
    results = [
        fit(scene, observations, parameters, method=method, rtol=2e-3, progress=False)
        for method in ("dense", "iterative")
    ]
    assert [result.status for result in results] == [Status.CONVERGED] * 2
    # 0.02: a few times half the squared tolerance, summed over 33 parameters, and rounding of the loss.
    assert results[0].loss == pytest.approx(results[1].loss, abs=0.02 + 1e-6 * results[1].loss)
    first, second = (r.scene.sources["host"].parts["disk"].morphology for r in results)
    assert float(first.sersic_index) == pytest.approx(float(second.sersic_index), rel=5e-3)
    np.testing.assert_allclose(first.half_light_radius.values, second.half_light_radius.values, rtol=5e-3)


def test_noise_free_data_give_back_the_truth():
    scene, observations = make_scene(1.15), observed()
    # Without the prior of the rings' amplitudes, which pulls by a fraction of the standard errors.
    parameters = make_parameters(scene, observations).prior("*.amplitudes", None)
    result = fit(scene, observations, parameters, rtol=1e-3, progress=False)
    assert result.is_converged
    truth, found = make_scene().sources["host"].parts["disk"], result.scene.sources["host"].parts["disk"]
    # 2e-3, 5e-3: hundredths of the standard errors, to which the fit has converged.
    np.testing.assert_allclose(found.center, truth.center, atol=2e-3)
    np.testing.assert_allclose(found.morphology.half_light_radius.values, [3.0, 2.5, 2.2], rtol=5e-3)
    assert float(found.morphology.sersic_index) == pytest.approx(1.2, rel=5e-3)
    np.testing.assert_allclose(found.spectrum.flux, truth.spectrum.flux, rtol=5e-3)


def test_dense_steps_are_refused_where_they_can_not_be():
    scene, observations = make_scene(), observed()
    parameters = make_parameters(scene, observations).fix("sources").fix("observations")
    with pytest.raises(ValueError, match="wants 1 to 1000 free numbers and no free image"):
        fit(scene, observations, parameters, method="dense", progress=False)
    with pytest.raises(ValueError, match="method is one of auto, dense, iterative; got 'newton'"):
        fit(scene, observations, parameters, method="newton", progress=False)


@pytest.mark.parametrize("size", [1, 3, 12])
@pytest.mark.parametrize("seed", range(4))
def test_quadratic_programmes_against_scipy(size, seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size)) + 2 * np.eye(size)
    matrix, slope = root @ root.T, 3 * rng.normal(size=size)
    low, high = -rng.uniform(0, 1, size), rng.uniform(0, 1, size)
    low[rng.random(size) < 0.4], high[rng.random(size) < 0.4] = -np.inf, np.inf
    low[rng.random(size) < 0.2] = 0.0
    lower = np.linalg.cholesky(matrix)
    expected = scipy.optimize.lsq_linear(lower.T, -np.linalg.solve(lower, slope), (low, high), method="bvls", tol=1e-12)
    step, free = dense.quadratic_program(*(jnp.asarray(a) for a in (matrix, slope, low, high)))

    def value(d):
        return 0.5 * d @ matrix @ d + slope @ d

    # 1e-4: rounding in float32 of values of order ten.
    assert value(np.asarray(step, float)) == pytest.approx(value(expected.x), abs=1e-4)
    assert (np.asarray(step) >= low - 1e-6).all()
    assert (np.asarray(step) <= high + 1e-6).all()
    at_bound = np.isclose(expected.x, low, atol=1e-9) | np.isclose(expected.x, high, atol=1e-9)
    gradient = matrix @ expected.x + slope
    decided = np.abs(gradient) + ~at_bound > 1e-3
    np.testing.assert_array_equal(np.asarray(free)[decided], ~at_bound[decided])


def test_amplitudes_count_up_to_a_factor():
    scene, observations = make_scene(), observed()
    problem, state, layout = posterior.build(scene, observations, make_parameters(scene, observations))
    numbers, _ = layout.places["sources.rings.morphology.amplitudes"]
    vector = np.array(state.vector)
    vector[np.asarray(problem.index)[numbers]] *= 2
    models = [np.asarray(problem.model(State(jnp.asarray(v), ()))) for v in (state.vector, vector)]
    # 1e-5: rounding in float32.
    np.testing.assert_allclose(models[1], models[0], rtol=1e-5, atol=1e-5 * models[0].max())
    assert float(problem.loss(State(jnp.asarray(vector), ()))) > float(problem.loss(state)) + 100


def test_a_gaussian_of_any_start_converges():
    scene = Scene(
        Frame(SHAPE, channels="g", padding=8), [Source((15.0, 16.0), [5.0], GaussianMorphology(2.0, (0.3, 0)))]
    )
    blank = make_observation("g").match(scene.frame)
    data = blank.render(scene)[0]
    obs = make_observation("g", data)
    for radius, flux in ((0.3, 0.1), (6.0, 50.0)):
        start = Scene(scene.frame, [Source((16.0, 15.0), [flux], GaussianMorphology(radius))])
        result = fit(start, obs, progress=False)
        assert result.is_converged
        # 1e-3: a hundredth of the standard error, 0.01 times a few pixels over the flux.
        assert result.scene.sources["0"].spectrum.flux[0] == pytest.approx(5.0, rel=1e-3)


def test_blank_slopes_have_the_shapes_of_those_of_a_scene():
    """A fit compiles its steps for them."""
    scene, observations = make_scene(), observed()
    problem, state, _ = posterior.build(scene, observations, make_parameters(scene, observations))
    found, blank = stamp_slopes(problem, state), blank_slopes(problem)
    assert jax.tree.structure(found) == jax.tree.structure(blank)
    assert [each.aval for each in jax.tree.leaves(found)] == [each.aval for each in jax.tree.leaves(blank)]


def test_the_curvature_that_gauss_and_newton_leave_out():
    """Of a quadratic function with 1.7 times the Hessian along one component, after a full and a shortened step."""
    scene, observations = make_scene(0.9), observed()
    problem, state, layout = posterior.build(scene, observations, make_parameters(scene, observations))
    where = dense.dense_footprints(problem, layout, scene, observations)
    assert where is not None
    group, index = np.asarray(where.group), np.asarray(where.index)
    rng = np.random.default_rng(3)
    root = rng.normal(size=(len(index), len(index)))
    matrix, step = root @ root.T, rng.normal(size=len(index))
    same = group[:, None] == group
    chosen = (group == group[0])[:, None] & same
    true = matrix + 0.7 * np.where(chosen, matrix, 0.0)

    def along(values):
        return jnp.zeros(len(state.vector)).at[index].set(values)

    start = rng.normal(size=len(index))
    own = np.where(same, matrix, 0.0) @ step
    secant = Secant(along(start), along(step), along(matrix @ step), along(own), jnp.ones(len(state.vector)))
    for length in (1.0, 0.25):
        found = dense.stretched(secant, along(start + length * true @ step), jnp.asarray(length), where)
        expected = np.where(group == group[0], 1.7, 1.0)
        # 1e-3: rounding in float32 of sums that nearly cancel.
        np.testing.assert_allclose(np.asarray(found)[index], expected, rtol=1e-3)
