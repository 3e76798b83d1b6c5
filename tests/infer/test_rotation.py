"""Fits of the angle by which an image is turned against its WCS."""

import astropy.units as u
import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

from scenefit.app.serialization import from_tree, load, save, to_tree
from scenefit.data.nuisances import LARGEST_ROTATION, Astrometry
from scenefit.data.observation import Observation
from scenefit.data.sampling import NonuniformSampling, SeparableSampling, TurningSampling
from scenefit.infer import posterior
from scenefit.infer.errors import parameter_errors
from scenefit.infer.fit import fit
from scenefit.infer.problem import State
from scenefit.infer.sample import sample
from scenefit.model.morphology import GaussianMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Frame, pixel_map
from scenefit.sky.psf import GaussianPSF
from scenefit.survey.priors import automatic
from tests.blends import chi_square
from tests.helpers import tangent_wcs

FINE, COARSE, SCALE, ORIENTATION = (64, 64), (30, 30), 0.1, 15.0
ANGLE, SHIFT = 0.3, (0.03, -0.05)
ROTATION, OFFSET = "observations.{}.astrometry.rotation", "observations.{}.astrometry.shift"
PLACES = [(12.3, 13.8), (50.1, 10.7), (33.2, 29.9), (14.4, 48.6), (52.2, 53.1), (30.4, 54.8)]
FRAME = Frame(FINE, channels=("v", "g"), wcs=tangent_wcs(FINE, SCALE), padding=20)


def true_scene():
    sources = {}
    for number, place in enumerate(PLACES):
        shape = GaussianMorphology(1.2 + 0.2 * number, (0.2, -0.03 * number))
        sources[f"s{number}"] = Source(place, [400.0, 300.0], shape)
    return Scene(FRAME, sources)


def observe(name, data=None, turn=0.0, **more):
    """The coarse image has the axes turned by 15 degrees, by `turn` less if the truth is asked for."""
    shape, scale, psf, angle = (FINE, SCALE, 1.2, 0.0) if name == "fine" else (COARSE, 2 * SCALE, 1.3, ORIENTATION)
    return Observation(
        np.zeros(shape) if data is None else data,
        sigma=1.0,
        psf=GaussianPSF(psf),
        wcs=tangent_wcs(shape, scale, rotation_deg=angle - turn),
        channels=["v" if name == "fine" else "g"],
        name=name,
        **more,
    )


def simulated(seed):
    """A fine image, and a coarse one that was taken through a WCS turned by `ANGLE`, its sources displaced by `SHIFT`."""
    rng = np.random.default_rng(seed)
    scene, angle = true_scene(), np.deg2rad(ANGLE)
    # The shift is a direction on the sky as the WCS has it, which isn't as the sky is.
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    truth = {"fine": observe("fine"), "coarse": observe("coarse", turn=ANGLE).with_shift(turn @ SHIFT)}
    images = {name: obs.render(scene)[0] for name, obs in truth.items()}
    return [observe(name, image + rng.normal(size=image.shape)) for name, image in images.items()]


def free_parameters(observations):
    parameters = Parameters.default(true_scene(), observations).free(OFFSET.format("coarse"))
    return parameters.free(ROTATION.format("coarse"), prior=dist.Normal(0, 1.0 * u.deg))


def fitted(seed, **options):
    observations = simulated(seed)
    return fit(true_scene(), observations, free_parameters(observations), progress=False, throw=True, **options)


@pytest.fixture(scope="module")
def first():
    return fitted(0)


def test_rotations_are_recovered_within_their_errors(first):
    pulls = []
    for result in [first, *(fitted(seed) for seed in range(1, 6))]:
        errors, found = parameter_errors(result), result.observations[1].astrometry
        # Six sources, 4.5 arcsec from the middle, whose positions are known to 5 mas or so.
        assert 0.05 < errors[ROTATION.format("coarse")] < 0.15
        pulls.append(
            np.append(
                (found.rotation - ANGLE) / errors[ROTATION.format("coarse")],
                (found.shift - SHIFT) / errors[OFFSET.format("coarse")],
            )
        )
    # Of six standard normal numbers, the root mean square is within 0.25 and 1.94, and none is beyond 4, in 998 of 1000.
    assert np.all(np.abs(pulls) < 4)
    spread = np.sqrt(np.mean(np.square(pulls), axis=0))
    assert np.all((spread > 0.25) & (spread < 1.94))
    assert result.observations[0].astrometry.rotation == 0


def test_steps_by_conjugate_gradients_lead_to_the_same(first):
    result = fitted(0, method="iterative", rtol=0.005)
    error = parameter_errors(first)[ROTATION.format("coarse")]
    # Both end within a small fraction of the errors of the minimum.
    difference = result.observations[1].astrometry.rotation - first.observations[1].astrometry.rotation
    assert abs(difference) < 0.05 * error
    assert result.loss == pytest.approx(first.loss, abs=0.01)


def test_what_the_fit_minimised_is_what_the_observation_says(first):
    """The loss, but for its prior, is half the chi-square of `Observation.render` with the fitted rotation."""
    expected = 0.5 * chi_square(first.scene, first.observations)
    rotation = float(first.observations[1].astrometry.rotation)
    expected += 0.5 * rotation**2 + 0.5 * np.log(2 * np.pi)
    # 1e-5: rounding in sums of 5000 squares in float32.
    assert first.loss == pytest.approx(expected, rel=1e-5)
    unturned = first.observations[1].with_rotation(0.0)
    assert unturned.chi_square(first.scene)[0] > first.observations[1].chi_square(first.scene)[0] + 5


def test_draws_have_the_errors(first):
    posterior_draws = sample(first, "laplace", key=jax.random.key(2), progress=False)
    draws = posterior_draws[ROTATION.format("coarse")]
    assert draws.shape == (len(draws),)
    # 0.1: both are the normal approximation, one by the exact Hessian; 2400 draws.
    assert draws.std() == pytest.approx(float(parameter_errors(first)[ROTATION.format("coarse")]), rel=0.1)
    moved = posterior_draws.model(0)[1][1]
    assert moved.astrometry.rotation == pytest.approx(draws[0])
    assert isinstance(moved.renderer.sampling, TurningSampling)


def test_a_rotation_costs_nothing_where_there_is_none():
    observations = [obs.match(FRAME) for obs in simulated(0)]
    default = Parameters.default(true_scene(), observations)
    plain, _, _ = posterior.build(true_scene(), observations, default)
    assert [image.rotation for image in plain.images] == [None, None]
    assert [type(image.renderer.sampling) for image in plain.images] == [
        type(obs.renderer.sampling) for obs in observations
    ]
    assert isinstance(plain.images[1].renderer.sampling, NonuniformSampling | SeparableSampling)
    free, _, layout = posterior.build(true_scene(), observations, free_parameters(observations))
    assert free.images[0].rotation is None
    assert isinstance(free.images[1].renderer.sampling, TurningSampling)
    assert layout.places[ROTATION.format("coarse")][0].shape == ()
    # A known rotation is used, and not fitted.
    known = [observations[0], observations[1].with_rotation(0.2)]
    fixed, _, layout = posterior.build(true_scene(), known, default)
    assert float(fixed.images[1].rotation) == pytest.approx(0.2)
    assert ROTATION.format("coarse") not in layout.places


def test_the_padding_limits_a_free_rotation():
    frame = Frame(FINE, channels=("v", "g"), wcs=FRAME.wcs, padding=0)
    scene = Scene(frame, true_scene().sources)
    observations = [obs.match(frame) for obs in simulated(0)]
    parameters = free_parameters(observations).constrain(ROTATION.format("coarse"), constraints.real)
    problem, state, layout = posterior.build(scene, observations, parameters)
    element = layout.places[ROTATION.format("coarse")][0]
    largest = float(problem.highest.vector[element])
    # The pixels of the coarse image that are nearest to an edge of the canvas, by brute force, reach it at that angle.
    angles = np.deg2rad(np.linspace(0.5, 1.1, 61))
    renderer = observations[1].match(frame, turning=True).renderer
    y, x = np.mgrid[: COARSE[0], : COARSE[1]]
    inside = np.zeros(COARSE, bool)
    inside[renderer.window.slices] = renderer.inside
    offset = pixel_map(observations[1].wcs, frame.wcs, y[inside], x[inside]) - np.array(frame.center)
    along = offset[:, ::-1] * [1, -1]
    reach = [np.abs(np.cos(t) * offset + s * np.sin(t) * along).max() for t in angles for s in (1, -1)]
    expected = angles[np.nonzero(np.array(reach).reshape(-1, 2).max(axis=1) > 32)[0][0]]
    # 0.05: the limit is on the safe side by the second order in the angle; steps of the angles.
    assert 0.95 * np.rad2deg(expected) < largest < np.rad2deg(expected)
    assert float(problem.lowest.vector[element]) == -largest
    # A fit that would go further says so.
    far = problem.project(State(state.vector.at[element].set(-2.0), state.images))
    message = r"coarse: its rotation of 0\.\d+ degrees is the largest that the padding .*give the Frame more padding"
    with pytest.warns(UserWarning, match=message):
        _, moved = posterior.unpack(problem, far, layout, scene, observations)
    assert float(moved[1].astrometry.rotation) == pytest.approx(-largest)
    wide, _, layout = posterior.build(true_scene(), [o.match(FRAME) for o in simulated(0)], parameters)
    assert float(wide.highest.vector[layout.places[ROTATION.format("coarse")][0]]) == LARGEST_ROTATION


def test_one_observation_stays_as_it_is():
    parameters = Parameters.default(true_scene(), simulated(0))
    assert not any(p.free for p in parameters if p.path.endswith("rotation"))
    with pytest.raises(ValueError, match=r"astrometry\.rotation are free; nothing then says how the model is turned"):
        parameters.free("observations.*.astrometry.rotation")
    one = parameters.free(ROTATION.format("fine"))
    with pytest.raises(ValueError, match=r"Keep at least one of \['observations.fine.astrometry.rotation', "):
        one.free(ROTATION.format("coarse"))
    # The anchor of the shifts may be another one.
    one.free(OFFSET.format("coarse")).check_anchored()
    tied = parameters.tie(ROTATION.format("fine"), ROTATION.format("coarse"))
    with pytest.raises(ValueError, match="nothing then says how the model is turned"):
        tied.free(ROTATION.format("fine"))


def test_priors_in_other_units():
    parameters = free_parameters(simulated(0)).prior(ROTATION.format("coarse"), dist.Normal(0, 6 * u.arcmin))
    assert float(parameters[ROTATION.format("coarse")].prior.scale) == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"The prior of observations\.coarse\.astrometry\.rotation must be in deg"):
        parameters.prior(ROTATION.format("coarse"), dist.Normal(0, 1 * u.nJy))
    with pytest.raises(ValueError, match=r"a shape that broadcasts to \(\)"):
        parameters.prior(ROTATION.format("coarse"), dist.Normal(np.zeros(2), 0.1))


def test_automatic_priors_have_the_angle_of_a_pixel_at_the_edge():
    observations = simulated(0)
    parameters = Parameters.default(true_scene(), observations).free(ROTATION.format("coarse"))
    prior = automatic(true_scene(), observations, parameters)[ROTATION.format("coarse")].prior
    assert float(prior.base_dist.scale) == pytest.approx(np.rad2deg(1 / 15))
    assert float(prior.base_dist.loc) == 0


def test_saved_and_loaded(tmp_path, first):
    obs = observe("coarse", astrometry=Astrometry(SHIFT, 0.25 * u.deg))
    save(tmp_path / "obs.asdf", obs)
    loaded = load(tmp_path / "obs.asdf")
    assert loaded.astrometry.rotation == 0.25
    np.testing.assert_array_equal(loaded.astrometry.shift, SHIFT)
    save(tmp_path / "fit.asdf", first)
    again = load(tmp_path / "fit.asdf")
    np.testing.assert_array_equal(again.observations[1].astrometry.rotation, first.observations[1].astrometry.rotation)
    constraint = again.parameters[ROTATION.format("coarse")].constraint
    assert (constraint.lower_bound, constraint.upper_bound) == (-LARGEST_ROTATION, LARGEST_ROTATION)


def test_older_files_know_no_rotation():
    tree = to_tree(Astrometry(SHIFT, 0.2))
    del tree["rotation"]
    assert from_tree(tree).rotation == 0
    observations = simulated(0)
    parameters = Parameters.default(true_scene(), observations)
    old = {path: parameter for path, parameter in parameters.table.items() if not path.endswith("rotation")}
    problem, _, layout = posterior.build(
        true_scene(), [obs.match(FRAME) for obs in observations], Parameters(old, parameters.pixel_scale)
    )
    assert problem.images[1].rotation is None
    assert ROTATION.format("coarse") not in layout.places
