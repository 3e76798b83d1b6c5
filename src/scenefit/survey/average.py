"""Averages over models: profiles of a source from several posteriors, weighted with their evidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array

from scenefit.infer.sample import Posterior
from scenefit.survey.ellipses import GrowthTable
from scenefit.survey.profile import Profile, profiles


def evidence_weights(posteriors: Sequence[Posterior]) -> np.ndarray:
    """Return the probabilities of models, equal before the data, from the evidence of their posteriors.

    Parameters
    ----------
    posteriors : sequence of Posterior
        By `sample(result, "linear", ...)`, from fits to the same data.

    Returns
    -------
    array, shape (posterior,)
        Sums to 1.

    Raises
    ------
    ValueError
        If there is no posterior, one has no evidence, their data differ, or parameters without prior aren't the same.
    """
    posteriors = list(posteriors)
    if not posteriors:
        raise ValueError("An average wants at least one posterior.")
    evidence = np.array([each.log_evidence for each in posteriors])
    if not np.isfinite(evidence).all():
        raise ValueError(
            f"Posterior(s) {np.flatnonzero(~np.isfinite(evidence)).tolist()} have no evidence: it comes from "
            "sample(result, 'linear', ...) with a prior on all amplitudes."
        )
    first = posteriors[0]
    for number, each in enumerate(posteriors):
        if not _has_same_data(first, each):
            raise ValueError(f"The evidence of posterior {number} is that of other data than that of the first.")
        if differing := sorted(_without_prior(first) ^ _without_prior(each)):
            raise ValueError(
                f"Posteriors 0 and {number} differ in parameters without prior, so that their evidence can't be compared: "
                f"{', '.join(differing)}. Give these priors."
            )
    weights = np.exp(evidence - evidence.max())
    return weights / weights.sum()


def average_profiles(
    posteriors: Sequence[Posterior],
    name: str,
    *,
    key: Array,
    num_samples: int = 2400,
    radii=None,
    psf_sigma=None,
    observation: str | None = None,
) -> Profile:
    """Return the profile of a source averaged over models, such as sets of widths of rings: their draws, mixed by evidence.

    Parameters
    ----------
    posteriors : sequence of Posterior
        Of scenes with the same frame, each with that source, as for `evidence_weights`.
    name, radii, psf_sigma, observation
        As for `profile`.
    key : jax.random key
        Decides which draws are taken.
    num_samples : int
        Draws in all.

    Returns
    -------
    Profile

    Raises
    ------
    ValueError
        As `evidence_weights`; if frames or parts of the source differ, or `num_samples` isn't positive.
    KeyError
        If a scene has no such source.

    References
    ----------
    Hoeting et al. 1999, Statistical Science 14, 382, doi:10.1214/ss/1009212519.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is at least 1; got {num_samples}.")
    posteriors, weights = list(posteriors), evidence_weights(posteriors)
    frames = [each.result.scene.frame for each in posteriors]
    if any(frame.channels != frames[0].channels or frame.box != frames[0].box for frame in frames):
        raise ValueError("An average wants scenes with the same frame; theirs differ.")
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    counts = rng.multinomial(num_samples, weights)
    chosen = [_some(each, int(count), rng) for each, count in zip(posteriors, counts, strict=True) if count]
    found = profiles(chosen, name, radii=radii, psf_sigma=psf_sigma, observation=observation)
    if any(set(each.components) != set(found[0].components) for each in found):
        raise ValueError(f"An average wants the same parts of {name} in all scenes; theirs differ.")
    return _joined(found)


def _some(posterior: Posterior, count: int, rng: np.random.Generator) -> Posterior:
    """Return a posterior with so many of the draws, as one chain; each at most once if there are enough."""
    total = posterior.log_density.size
    index = rng.choice(total, count, replace=count > total)
    return dataclasses.replace(
        posterior,
        draws={path: posterior[path][index][None] for path in posterior.draws},
        log_density=posterior.log_density.reshape(-1)[index][None],
    )


def _joined(found: Sequence[Profile]) -> Profile:
    """Return the draws of several profiles as one profile."""

    def join(*each):
        return np.concatenate(each)

    tables = {}
    for label, table in found[0].tables.items():
        columns = [
            [np.broadcast_to(values, (len(each.center), *values.shape[1:])) for values in _columns(each.tables[label])]
            for each in found
        ]
        tables[label] = GrowthTable(table.log_radius, *(join(*column) for column in zip(*columns, strict=True)))
    return dataclasses.replace(
        found[0],
        total=jax.tree.map(join, *(each.total for each in found)),
        components={n: jax.tree.map(join, *(each.components[n] for each in found)) for n in found[0].components},
        center=join(*(each.center for each in found)),
        ellipticity=join(*(each.ellipticity for each in found)),
        tables=tables,
    )


def _columns(table: GrowthTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what a table has for every draw."""
    return table.log_density, table.steepness, table.growth


def _has_same_data(first: Posterior, second: Posterior) -> bool:
    """Return whether two fits are to the same data."""
    pairs = first.result.observations, second.result.observations
    return len(pairs[0]) == len(pairs[1]) and all(
        a.data.shape == b.data.shape and np.array_equal(a.data, b.data, equal_nan=True)
        for a, b in zip(*pairs, strict=True)
    )


def _without_prior(posterior: Posterior) -> set[str]:
    """Return the free parameters that have no prior."""
    return {p.path for p in posterior.result.parameters if p.free and p.tied_to is None and p.prior is None}
