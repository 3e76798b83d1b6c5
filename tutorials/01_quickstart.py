"""Quickstart: from a FITS file with images of two telescopes to a catalogue, in a dozen lines.

The packaged demo field is a simulated blend of seven sources, seen by the Hubble Space Telescope (one F814W image with
pixels of 0.03") and by Hyper Suprime-Cam (g, r, i, z, y images with pixels of 0.168"). The two have different PSFs,
depths, orientations and flux units, and the coordinates of the second are wrong by a few hundredths of an arcsecond.
One model is fitted to all six images, each in its own pixels, and compared with the truth that comes with the field.

    python 01_quickstart.py

writes figures, catalogue and model into the current folder, all named 01_*, and takes less than a minute.
"""

from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import QTable, Table
from matplotlib.figure import Figure

import scenefit as sf

FAINT_MAG = 22.5  # in i; one source of the field is fainter


def main():
    # The file holds image, weights and PSF of each instrument, and a table of positions. `datasets.load` would give
    # all of them at once; reading the file by hand is what you will do with your own.
    path = sf.datasets.load("demo").path
    observations = sf.read_observations(path)
    positions, _ = sf.read_catalog(path)
    for obs in observations:
        print(f"{obs.name}: {obs.shape} (channel, y, x), channels {', '.join(obs.channels)}, {obs.flux_unit}")
        sf.plot.observation(obs, catalog=positions).savefig(f"01_{obs.name}.png", dpi=150)

    # The model lives on the finest pixels, over everything that any of the images sees, with one channel per band.
    frame = sf.Frame.from_observations(observations)
    print(f'model frame: {frame.shape} (channel, y, x), {frame.pixel_scale:.3f}" a pixel')

    # The start: one source of free non-negative pixels at each position, shaped after the sharpest image.
    scene = sf.initialize(frame, observations, positions, model="pixel")

    # Fluxes and pixels are free by default. The HSC image may also be displaced; the HST image stays as the anchor.
    parameters = sf.Parameters.default(scene, observations).free("observations.HSC.astrometry.shift")
    result = sf.fit(scene, observations, parameters)
    print(f"fit {result.status.value} after {result.num_steps} steps, loss {result.loss:.0f}")
    assert result.is_converged

    # One row a source: position, flux, AB magnitude and their errors in every band, size, shape, flags.
    table = sf.catalog(result)
    table.write("01_catalog.ecsv", overwrite=True)
    truth = Table.read(path, hdu="TRUTH")
    check_magnitudes(table, truth)
    check_offset(result, fits.getheader(path))
    check_chi_square(result)

    sf.plot.scene(result.scene, result.observations).savefig("01_scene.png", dpi=150)
    sf.plot.sources(result.scene, result.observations).savefig("01_sources.png", dpi=150)
    sf.plot.convergence(result).savefig("01_convergence.png", dpi=150)
    plot_magnitudes(table, truth).savefig("01_magnitudes.png", dpi=150)

    save_and_refit(result, table)
    print("written:", *sorted(path.name for end in ("png", "ecsv", "asdf") for path in Path().glob(f"01_*.{end}")))


def check_magnitudes(table: QTable, truth: Table):
    """Print the catalogue beside the truth, and make sure that they agree."""
    side_by_side = Table({"id": table["id"], "kind": truth["kind"]})
    for band in ("F814W", "g", "i"):
        side_by_side[f"{band} true"] = np.round(truth[f"mag_{band}"].value, 2)
        side_by_side[f"{band} fit"] = np.round(table[f"mag_{band}"].value, 2)
    side_by_side["size true"] = np.round(truth["half_light_radius_arcsec"].value, 2)
    side_by_side["size fit"] = np.round(table["half_light_radius"].to_value("arcsec"), 2)
    side_by_side["snr"] = np.round(table["snr"]).astype(int)
    print("\n".join(side_by_side.pformat(max_width=-1)))

    # Free pixels describe any galaxy, but the data hardly say how much light is in its faint outskirts, where
    # non-negative pixels turn noise into light. That, more than what the columns flux_err_* hold, limits
    # the magnitudes: the bright sources are wrong by some hundredths, the faint one is too bright by half a magnitude.
    # The tolerances are about twice what such outskirts have been seen to do in this field.
    bright = truth["mag_i"] < FAINT_MAG
    for band in ("F814W", "i"):
        error = (table[f"mag_{band}"].value - truth[f"mag_{band}"].value)[bright]
        print(f"{band}: magnitudes of the {bright.sum()} bright sources are off by {np.abs(error).max():.3f} at most")
        assert np.median(np.abs(error)) < 0.05
        assert np.abs(error).max() < 0.12
    assert not table["flags"].any()


def check_offset(result: sf.FitResult, header: fits.Header):
    """Print how far the HSC image is displaced, and make sure that it is the truth within the errors."""
    fitted = {obs.name: obs.astrometry.shift for obs in result.observations}["HSC"]
    error = sf.offset_errors(result)["HSC"]
    true = np.array([header["OFF_E"], header["OFF_N"]])
    print(
        f"HSC displaced by {1e3 * fitted[0]:+.1f} +- {1e3 * error[0]:.1f} mas east and "
        f"{1e3 * fitted[1]:+.1f} +- {1e3 * error[1]:.1f} mas north (truth {1e3 * true[0]:+.0f}, {1e3 * true[1]:+.0f})"
    )
    # The noise of this field allows 1 mas, 0.006 of an HSC pixel. Three times that would mean that information is lost.
    assert np.all(error < 0.003)
    # A few standard errors: two numbers exceed 4 of them once in eight thousand fields.
    assert np.all(np.abs(fitted - true) < 4 * error)


def check_chi_square(result: sf.FitResult):
    """Print how well the model describes each image."""
    for obs in result.observations:
        per_pixel = obs.chi_square(result.scene) / obs.noise.valid.sum(axis=(1, 2))
        print(
            f"{obs.name}: chi-square per pixel",
            {c: round(v, 2) for c, v in zip(obs.channels, per_pixel.tolist(), strict=True)},
        )
        # A little below one where free pixels follow the noise; above one in g, where the spiral's bulge and arms
        # differ in color while a source has one color here.
        assert np.all((per_pixel > 0.85) & (per_pixel < 1.4))


def plot_magnitudes(table: QTable, truth: Table) -> Figure:
    """Draw the magnitude errors of all bands against the true magnitude."""
    fig = Figure(figsize=(6, 3.6), layout="constrained")
    ax = fig.add_subplot()
    ax.axhline(0, color="0.5", linewidth=1)
    bands = {"F814W": "black", "g": "#0072B2", "r": "#009E73", "i": "#E69F00", "z": "#D55E00", "y": "#CC79A7"}
    for band, color in bands.items():
        true, fitted = truth[f"mag_{band}"].value, table[f"mag_{band}"].value
        ax.errorbar(true, fitted - true, table[f"mag_err_{band}"].value, fmt="o", ms=4, color=color, label=band)
    ax.set(xlabel="true AB magnitude", ylabel="fitted − true magnitude")
    ax.legend(ncols=3, fontsize="small")
    return fig


def save_and_refit(result: sf.FitResult, table: QTable):
    """Save the fit, load it, and go on from there with one more thing free."""
    sf.save("01_fit.asdf", result)
    loaded = sf.load("01_fit.asdf")
    np.testing.assert_array_equal(sf.catalog(loaded)["flux_i"], table["flux_i"])

    # What was free is saved too, so that this frees the HSC background besides pixels, fluxes and offset. The simulated
    # sky is flat at zero.
    parameters = loaded.parameters.free("observations.HSC.background")
    again = sf.fit(loaded.scene, loaded.observations, parameters, progress=False)
    background = {obs.name: obs.background for obs in again.observations}["HSC"]
    noise = {obs.name: obs.noise.level() for obs in again.observations}["HSC"]
    print(
        f"refit from the file: {again.status.value}, HSC background / noise of a pixel:",
        np.round(background / noise, 3),
    )
    assert again.is_converged
    # The noise of 48 x 48 pixels allows 0.02 of that of one. Light beyond the stamps counts as sky, too: a few times that.
    assert np.all(np.abs(background) < 0.2 * noise)


if __name__ == "__main__":
    main()
