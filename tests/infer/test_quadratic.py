"""Curvature and conjugate gradients against dense linear algebra."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scenefit.infer import posterior
from scenefit.infer.fit import fit
from scenefit.infer.problem import State
from scenefit.infer.quadratic import FLUX_CURVATURE, ConjugateIterate, conjugate_step, curvature_probes, dot
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.survey.initialize import initialize
from tests.blends import GALAXIES, dense_jacobian, frame_of, observe, on_frame, true_scene


@pytest.fixture(scope="module")
def blend():
    """Problem and state of the true blend, offset and background free, and the dense J^T J of its vector."""
    observations = observe()
    scene = true_scene(frame_of(observations))
    observations = [obs.match(scene.frame) for obs in observations]
    parameters = (
        Parameters.default(scene, observations)
        .free("observations.coarse.astrometry.shift")
        .free("observations.coarse.background*")
    )
    problem, state, _ = posterior.build(scene, observations, parameters)
    columns = dense_jacobian(problem, state)
    return problem, state, columns.T @ columns


def test_probes_estimate_the_diagonal(blend):
    problem, _, dense = blend
    probes = np.asarray(curvature_probes(problem), float)
    free = np.asarray(problem.free.vector)
    assert (np.count_nonzero(probes[:, free], axis=0) == 1).all()
    assert not probes[:, ~free].any()
    estimate = np.abs(probes * (probes @ dense)).sum(axis=0)
    is_flux = np.zeros(len(free), bool)
    for leaf in problem.leaves:
        if leaf.name == "flux":
            is_flux[leaf.start : leaf.stop] = True
    rows = dense[np.ix_(is_flux & free, is_flux & free)].sum(axis=1)
    # 1e-6: float32 products.
    np.testing.assert_allclose(estimate[is_flux & free], FLUX_CURVATURE * rows, rtol=1e-6)
    # A factor of two for what overlapping galaxies share, though the curvatures span six orders of magnitude.
    others = free & ~is_flux
    ratio = estimate[others] / np.diag(dense)[others]
    assert 0.5 < ratio.min() <= ratio.max() < 2
    assert np.diag(dense)[free].max() > 1e6 * np.diag(dense)[free].min()


def test_a_problem_without_free_numbers_has_an_empty_probe(blend):
    problem, state, _ = blend
    nothing = State(jnp.zeros(state.vector.shape, bool), ())
    probes = np.asarray(curvature_probes(eqx.tree_at(lambda p: p.free, problem, nothing)))
    assert len(probes) > 0
    assert not probes.any()


def test_conjugate_steps_solve_a_linear_system(rng):
    root = rng.normal(size=(5, 5))
    matrix, wanted = jnp.asarray(root @ root.T + np.eye(5)), jnp.asarray(rng.normal(size=5))
    diagonal = State(jnp.diag(matrix), ())
    remainder = State(matrix @ wanted, ())
    direction = jax.tree.map(jnp.divide, remainder, diagonal)
    iterate = ConjugateIterate(State(jnp.zeros(5), ()), remainder, direction, dot(remainder, direction))
    held, gain = conjugate_step(iterate, State(matrix @ direction.vector, ()), diagonal, active=False)
    assert not np.asarray(held.step.vector).any()
    assert float(gain) == 0
    total = 0.0
    for _ in range(5):
        iterate, gain = conjugate_step(iterate, State(matrix @ iterate.direction.vector, ()), diagonal)
        total += float(gain)
    # 1e-4: five iterations in float32.
    np.testing.assert_allclose(iterate.step.vector, wanted, rtol=1e-4, atol=1e-4)
    assert total == pytest.approx(float(0.5 * wanted @ matrix @ wanted), rel=1e-4)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_wrong_fluxes_at_the_start_cost_little(factor):
    observations = observe(seed=7)
    frame = frame_of(observations)
    scene = initialize(
        frame, observations, np.array([on_frame(frame, galaxy) for galaxy in GALAXIES.values()]), model="pixel"
    )
    sources = {n: Source(s.center, factor * s.spectrum.flux, s.morphology) for n, s in scene.sources.items()}
    near = fit(scene, observations, progress=False)
    far = fit(Scene(frame, sources), observations, progress=False)
    assert near.is_converged
    assert far.is_converged
    assert far.history["products"][-1] < 2 * near.history["products"][-1]
    # One unit of the loss is within the tolerance of the fits.
    assert far.loss == pytest.approx(near.loss, abs=1.0)
