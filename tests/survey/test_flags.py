import re
from pathlib import Path

import numpy as np
import pytest
from numpyro.distributions import constraints

import scenefit as sf
from scenefit.infer.fit import FitResult, Status
from scenefit.survey.columns import CHANNEL_COLUMNS, COLUMNS, spectral_part
from scenefit.survey.flags import LARGEST_BLENDEDNESS, LARGEST_CORRELATION, MASKED_FRACTION, Flag, flag_table
from tests.helpers import tangent_wcs

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
SIZE = 61
# All scenes have three sources of one kind, so that they share a compilation.
PLACES = {"a": (30.0, 22.0), "b": (30.3, 38.0), "c": (6.0, 45.0)}


def observe(weights=1.0):
    """Return an empty image in g and r."""
    weights = np.broadcast_to(weights, (2, SIZE, SIZE))
    return sf.Observation(np.zeros(weights.shape), weights=weights, psf=sf.GaussianPSF(1.5), channels=["g", "r"])


def table_of(obs=None, places=PLACES, fluxes=(400.0, 400.0), parameters=None, status=Status.CONVERGED):
    """Return the catalogue of three Gaussians as if they had been fitted."""
    fluxes = fluxes if isinstance(fluxes, dict) else dict.fromkeys(places, fluxes)
    sources = {name: sf.Source(place, fluxes[name], sf.GaussianMorphology(1.5)) for name, place in places.items()}
    return table_of_sources(sources, obs, parameters, status)


def table_of_sources(sources, obs=None, parameters=None, status=Status.CONVERGED):
    """Return the catalogue of sources as if they had been fitted."""
    obs = observe() if obs is None else obs
    frame = sf.Frame.from_observations([obs])
    scene, matched = sf.Scene(frame, sources), (obs.match(frame),)
    parameters = sf.Parameters.default(scene, matched) if parameters is None else parameters(scene, matched)
    return sf.catalog(FitResult(scene, matched, parameters, status, 0.0, {}, 0, {}), progress=False)


def flagged(table, flag) -> set[str]:
    """Return the sources that have a flag."""
    return {str(row["id"]) for row in table if row["flags"] & flag}


def test_the_guide_lists_the_registry():
    assert flag_table() in GUIDE.read_text()


def test_the_guide_lists_all_columns():
    section = GUIDE.read_text().split("## The catalogue")[1].split("\n## ")[0]
    listed = set(re.findall(r"`(\w+)`", section))
    assert {*COLUMNS, *(f"{name}_CH" for name in CHANNEL_COLUMNS)} <= listed


def test_bits_are_apart_and_explained():
    assert [flag.value for flag in Flag] == [2**n for n in range(len(Flag))]
    assert all(flag.__doc__ and flag.__doc__.endswith(".") for flag in Flag)
    # What tables that are there already say.
    assert (Flag.EDGE, Flag.NO_DATA, Flag.NOT_CONVERGED, Flag.ZERO_FLUX, Flag.VANISHED, Flag.AT_BOUND) == (
        1,
        2,
        4,
        8,
        16,
        32,
    )
    assert Flag(65) == Flag.EDGE | Flag.MASKED


def test_a_clean_scene_has_none():
    table = table_of()
    assert list(table["flags"]) == [0, 0, 0]
    # 1e-3 of the light is beyond the stamp, and beyond the edge for "c".
    np.testing.assert_allclose(table["masked_fraction"][:2], 0, atol=2e-3)
    assert (table["flux_correlation"] < 0.05).all()


@pytest.mark.parametrize(("place", "is_flagged"), [(2.0, True), (3.2, False)])
def test_light_beyond_the_frame(place, is_flagged):
    """2.3 and 0.07 % of a Gaussian, so many of its widths from the edge (half-light radius 1.5, model PSF 0.7)."""
    table = table_of(places={**PLACES, "c": (30.0, place * np.hypot(1.5 / np.sqrt(2 * np.log(2)), 0.7) - 0.5)})
    assert flagged(table, Flag.EDGE) == ({"c"} if is_flagged else set())


def test_free_pixels_that_end_at_the_edge():
    places = {"in": (30.0, 22.0), "out": (30.0, 5.0)}
    square = sf.PixelMorphology(np.ones((11, 11)))
    table = table_of_sources({name: sf.Source(place, [1.0, 1.0], square) for name, place in places.items()})
    assert flagged(table, Flag.EDGE) == {"out"}


def test_a_clump_without_light_is_no_bound():
    morphology = sf.ClumpyMorphology(4.0, 1.0, (0.1, 0.0), [[2.0, 3.0], [-3.0, 1.0]], [0.1, 0.0])
    assert table_of_sources({"a": sf.Source((30.0, 30.0), [400.0, 400.0], morphology)})["flags"][0] == 0


def test_masked_light():
    """Half of "a" without information in one of two channels; a hole beside "b"; a channel without data at all doesn't count."""
    weights = np.ones((2, SIZE, SIZE))
    weights[1, :, :22] = 0.0
    weights[1, 30, 22] = 0.0
    weights[:, 45:, 35:] = 0.0
    table = table_of(observe(weights))
    assert flagged(table, Flag.MASKED) == {"a"}
    # Columns before the center, half of all light but that in the central column, and one pixel.
    sigma2 = 1.5**2 / (2 * np.log(2)) + 1.5**2 + 1 / 12
    column = 1 / np.sqrt(2 * np.pi * sigma2)
    expected = 0.5 * (1 - column) + 1 / (2 * np.pi * sigma2)
    # 2e-3: light per pixel for its density, and what is beyond the stamp.
    assert table["masked_fraction"][0] == pytest.approx(expected, abs=2e-3)
    assert expected > MASKED_FRACTION
    weights = np.ones((2, SIZE, SIZE))
    weights[1] = 0.0
    dead = table_of(observe(weights))
    assert flagged(dead, Flag.MASKED) == set()
    assert flagged(dead, Flag.NO_DATA) == set(PLACES)


def test_negative_fluxes():
    """Where they are allowed, a flux is flagged when it is 3 errors below zero; sources here have errors of about 11."""

    def unbounded(scene, observations):
        return sf.Parameters.default(scene, observations).constrain("sources.*.spectrum.flux", constraints.real)

    fluxes = {"a": [400.0, -100.0], "b": [400.0, -5.0], "c": [400.0, 300.0]}
    table = table_of(fluxes=fluxes, parameters=unbounded)
    assert flagged(table, Flag.NEGATIVE) == {"a"}
    assert flagged(table, Flag.ZERO_FLUX) == {"a", "b"}
    assert (3 * table["flux_err_r"] < 100).all()
    assert (table["flux_err_r"] > 5).all()


def test_blends_that_only_the_model_divides():
    """Two Gaussians a third of a PSF apart trade their fluxes; a faint one on a bright one drowns."""
    together = {"a": (30.0, 30.0), "b": (30.0, 30.5), "c": (6.0, 45.0)}
    table = table_of(places=together)
    assert flagged(table, Flag.BLENDED) == {"a", "b"}
    assert (table["flux_correlation"][:2] > LARGEST_CORRELATION).all()
    fluxes = {"a": [4e4, 4e4], "b": [400.0, 400.0], "c": [400.0, 400.0]}
    drowned = table_of(places={**together, "b": (30.0, 36.0)}, fluxes=fluxes)
    assert flagged(drowned, Flag.BLENDED) == {"b"}
    assert drowned["blendedness_g"][1] > LARGEST_BLENDEDNESS
    assert (drowned["flux_correlation"] < LARGEST_CORRELATION).all()


def test_parts_of_the_spectrum():
    expected = {
        "u": "em.opt.U",
        "g": "em.opt.B",
        "sdss_r": "em.opt.R",
        "HSC-I": "em.opt.I",
        "Ks": "em.IR.K",
        "H": "em.IR.H",
    }
    expected |= {"F814W": "em.opt.I", "F606W": "em.opt.R", "F275W": "em.UV", "F160W": "em.IR.H", "F475X": "em.opt.B"}
    expected |= {"VIS": None, "o_0": None, "": None}
    assert {name: spectral_part(name) for name in expected} == expected


def test_a_source_that_an_image_does_not_show():
    """All fixed, and one channel of a small image that lies elsewhere."""
    wide, small = (
        sf.Observation(
            np.zeros((1, size, size)),
            weights=1.0,
            psf=sf.GaussianPSF(1.5),
            wcs=tangent_wcs((size, size)),
            channels=[channel],
            name=name,
        )
        for size, channel, name in ((SIZE, "g", "wide"), (15, "r", "small"))
    )
    frame = sf.Frame.from_observations([wide, small], "union")
    sources = {name: sf.Source(place, [90.0, 90.0], sf.GaussianMorphology(1.5)) for name, place in PLACES.items()}
    scene = sf.Scene(frame, {**sources, "a": sf.Source((30.0, 30.0), [90.0, 90.0], sf.GaussianMorphology(1.5))})
    matched = tuple(obs.match(frame) for obs in (wide, small))
    parameters = sf.Parameters.default(scene, matched).fix("sources")
    table = sf.catalog(FitResult(scene, matched, parameters, Status.CONVERGED, 0.0, {}, 0, {}), progress=False)
    np.testing.assert_array_equal(table["flux_err_g"], 0)
    assert flagged(table, Flag.MASKED) == {"b", "c"}
    assert table["masked_fraction"][2] == pytest.approx(1, abs=1e-6)
    assert table["num_pixels_r"][2] == 0
    assert np.isnan(table["chi_square_r"][2])
    assert np.isnan(table["blendedness_r"][2])
    np.testing.assert_array_equal(table["star_score"], 0)
    empty = sf.Scene(frame, {})
    result = FitResult(empty, matched, sf.Parameters.default(empty, matched), Status.CONVERGED, 0.0, {}, 0, {})
    assert len(sf.catalog(result, progress=False)) == 0
