"""One Sersic galaxy in three images of unlike scale, fitted jointly: time, and pulls over noise draws; AstroPhot's time.

    python benchmarks/joint_images.py [--draws 50] [--pixel-scale 0.55] [--rotate] [--peer-python PYTHON] [--json]

GalSim draws an r image of 500 x 500 pixels of 0.262" (PSF 1.12" wide), W1 of 52 x 52 of 2.75" (6.1") and NUV of 90 x 90 of 1.5"
(5.4"), with peak signal-to-noise ratios of 100, 30 and 5, of a galaxy of n = 1.8, semi-major half-light radius 18", axis
ratio 0.55.
`--rotate` turns W1 by 20 degrees. Nine parameters: centre, radius, index, ellipticity, and one flux for each image.
`--pixel-scale` is that of the model; 0.55" is as coarse as the sharpest PSF allows. `--peer-python` runs AstroPhot's
Levenberg-Marquardt on the images of the first `--peer-draws` noise draws, with PSFs of the sky alone, as it wants them, and its
own start. Its first fit, and ours, which compiles, count apart.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import astropy.units as u
import galsim
import numpy as np
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS

import scenefit as sf

CAMERAS = {
    "r": {"size": 500, "scale": 0.262, "fwhm": 1.12, "snr": 100.0, "sigma": 0.01, "kernel": 51},
    "W1": {"size": 52, "scale": 2.75, "fwhm": 6.1, "snr": 30.0, "sigma": 5.0, "kernel": 21},
    "NUV": {"size": 90, "scale": 1.5, "fwhm": 5.4, "snr": 5.0, "sigma": 0.003, "kernel": 21},
}
CENTER_DEG = (187.3119, 12.9783)
INDEX, RADIUS, RATIO, ANGLE, OFFSET = 1.8, 18.0, 0.55, 40.0, (0.37, -0.53)
ACCURACY = galsim.GSParams(
    folding_threshold=1e-4, maxk_threshold=1e-4, kvalue_accuracy=1e-6, stepk_minimum_hlr=8, maximum_fft_size=20000
)


def make_wcs(camera, turn):
    angle = np.deg2rad(turn)
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval = ["RA---TAN", "DEC--TAN"], list(CENTER_DEG)
    wcs.wcs.crpix = [(camera["size"] + 1) / 2] * 2
    turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    wcs.wcs.cd = np.diag([-1.0, 1.0]) @ turned * camera["scale"] / 3600
    return wcs


def draw(camera, wcs):
    """Return the image of the galaxy of unit flux, and the PSF with the pixel in it."""
    profile = galsim.Sersic(n=INDEX, half_light_radius=RADIUS * np.sqrt(RATIO), gsparams=ACCURACY)
    profile = profile.shear(q=RATIO, beta=(90 + ANGLE) * galsim.degrees).shift(-OFFSET[0], OFFSET[1])
    psf = galsim.Gaussian(fwhm=camera["fwhm"], gsparams=ACCURACY)
    # GalSim's tangent plane has u to the west.
    jacobian = np.diag([-1.0, 1.0]) @ wcs.wcs.cd * 3600
    image = galsim.Convolve(profile, psf, gsparams=ACCURACY).drawImage(
        nx=camera["size"], ny=camera["size"], wcs=galsim.JacobianWCS(*jacobian.ravel()), dtype=float
    )
    kernel = psf.drawImage(nx=camera["kernel"], ny=camera["kernel"], scale=camera["scale"], dtype=float).array
    return image.array, kernel / kernel.sum()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--pixel-scale", type=float, default=0.55)
    parser.add_argument("--rotate", action="store_true")
    parser.add_argument("--peer-python")
    parser.add_argument("--peer-draws", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    clean, fluxes = {}, {}
    for name, camera in CAMERAS.items():
        wcs = make_wcs(camera, 20.0 if options.rotate and name == "W1" else 0.0)
        unit, kernel = draw(camera, wcs)
        fluxes[name] = camera["snr"] * camera["sigma"] / unit.max()
        clean[name] = fluxes[name] * unit, kernel, wcs
    seconds, pulls, chi_squares, indices = [], [], [], []
    for seed in range(options.draws):
        observations = []
        for name, data in draw_noise(clean, seed).items():
            _, kernel, wcs = clean[name]
            sigma = CAMERAS[name]["sigma"]
            observations.append(sf.Observation(data, sigma=sigma, psf=kernel, wcs=wcs, channels=name, name=name))
        frame = sf.Frame.from_observations(observations, pixel_scale=options.pixel_scale)
        start = sf.SersicMorphology(RADIUS / 2 / frame.pixel_scale, 1.0)
        flux = [obs.data.sum() for obs in observations]
        scene = sf.Scene(frame, {"galaxy": sf.Source(frame.center, flux, start)})
        begin = time.perf_counter()
        result = sf.fit(scene, observations, progress=False)
        seconds.append(time.perf_counter() - begin)
        pulls.append(deviations(result, fluxes))
        path = "sources.galaxy.morphology.sersic_index"
        index = float(result.scene.sources["galaxy"].morphology.sersic_index)
        indices.append((index, float(sf.parameter_errors(result)[path])))
        residuals = [obs.chi_square(result.scene).sum() for obs in result.observations]
        chi_squares.append(sum(residuals) / (sum(obs.data.size for obs in observations) - 9))
        if not result.is_converged:
            print(f"seed {seed}: {result.status.value}")
    names = list(pulls[0])
    table = np.array([[row[name] for name in names] for row in pulls])
    print(f"first {seconds[0]:.2f} s, then {np.median(seconds[1:]):.2f} s (median, matching included)")
    print(
        f"chi-square per degree of freedom {np.mean(chi_squares):.4f}, {min(chi_squares):.4f} to {max(chi_squares):.4f}"
    )
    for name, column in zip(names, table.T, strict=True):
        print(
            f"pull of {name:8s} mean {column.mean():6.3f}, width {column.std():.3f}, largest {np.abs(column).max():.2f}"
        )
    widths = dict(zip(names, table.std(axis=0).tolist(), strict=True))
    record = {"seconds": seconds, "widths": widths, "chi_square": float(np.mean(chi_squares))}
    if options.peer_python:
        record["astrophot"] = peer = run_peer(options.peer_python, clean, options.peer_draws)
        compare(seconds, chi_squares, indices, peer)
    if options.json:
        print(json.dumps(record))


def draw_noise(clean, seed):
    """Return the images of a noise draw by name."""
    rng = np.random.default_rng(seed)
    return {
        name: image + CAMERAS[name]["sigma"] * rng.normal(size=image.shape) for name, (image, _, _) in clean.items()
    }


def run_peer(python, clean, draws):
    """Return what AstroPhot finds for the first noise draws."""
    with tempfile.TemporaryDirectory() as folder:
        content = {"names": list(CAMERAS), "draws": draws}
        for name, camera in CAMERAS.items():
            # It integrates its profiles over pixels and would convolve with the pixel a second time.
            size, psf = camera["kernel"], galsim.Gaussian(fwhm=camera["fwhm"])
            kernel = psf.drawImage(nx=size, ny=size, scale=camera["scale"], method="no_pixel", dtype=float).array
            # With the wings of a Gaussian as they are (down to 1e-80) its Jacobian takes eight times as long.
            kernel = np.maximum(kernel / kernel.sum(), 1e-15)
            content[f"psf_{name}"], content[f"sigma_{name}"] = kernel, camera["sigma"]
            content[f"shape_{name}"] = clean[name][0].shape
        np.savez(Path(folder) / "images.npz", **content)
        for seed in range(draws):
            for name, data in draw_noise(clean, seed).items():
                # astropy writes PC and CDELT, which it doesn't read.
                wcs = clean[name][2].wcs
                header = fits.Header({"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN"})
                for i in (0, 1):
                    header[f"CRVAL{i + 1}"], header[f"CRPIX{i + 1}"] = wcs.crval[i], wcs.crpix[i]
                    header[f"CD{i + 1}_1"], header[f"CD{i + 1}_2"] = wcs.cd[i]
                fits.writeto(Path(folder) / f"{name}_{seed}.fits", data, header)
        script = Path(__file__).parent / "peers" / "astrophot_joint.py"
        command = [python, "-W", "ignore", str(script), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(seconds, chi_squares, indices, peer):
    """Print times and what was reached beside each other."""
    theirs, ours = float(np.median(peer["fit_s"][1:])), float(np.median(seconds[1:]))
    started = theirs + float(np.median(peer["initialize_s"][1:]))
    print(
        f"AstroPhot: first {peer['fit_s'][0]:.2f} s, then {theirs:.2f} s (median; {started:.2f} s with its start), "
        f"{min(peer['steps'])} to {max(peer['steps'])} steps"
    )
    print(f"ours {ours / theirs:.3f} of that; first calls {seconds[0] / peer['fit_s'][0]:.2f}")
    # Both count the same pixels.
    freedom = sum(camera["size"] ** 2 for camera in CAMERAS.values()) - 9
    excess = [(a - b) * freedom for a, b in zip(peer["chi_square"], chi_squares, strict=False)]
    distance = [(n - own) / error for n, (own, error) in zip(peer["n"], indices, strict=False)]
    print(f"its chi-square is larger than ours by {', '.join(f'{each:.1f}' for each in excess)}")
    print(f"its n is off from ours by {', '.join(f'{each:+.2f}' for each in distance)} standard errors")


def deviations(result, fluxes):
    """Return deviations from the truth in standard errors."""
    source, frame = result.scene.sources["galaxy"], result.scene.frame
    errors, base = sf.parameter_errors(result), "sources.galaxy."
    center = SkyCoord(*CENTER_DEG, unit="deg").spherical_offsets_by(OFFSET[0] * u.arcsec, OFFSET[1] * u.arcsec)
    y, x = frame.to_pixel(center)
    norm = (1 - RATIO**2) / (1 + RATIO**2)
    # Angle from +x of the frame: x points west, so that a position angle PA (east of north) is at 90 + PA.
    theta = np.deg2rad(90 + ANGLE)
    truth = {
        "y": (source.center[0], y, errors[base + "center"][0]),
        "x": (source.center[1], x, errors[base + "center"][1]),
        "radius": (
            float(source.morphology.half_light_radius),
            RADIUS * np.sqrt(RATIO) / frame.pixel_scale,
            float(errors[base + "morphology.half_light_radius"]),
        ),
        "n": (float(source.morphology.sersic_index), INDEX, float(errors[base + "morphology.sersic_index"])),
        "e1": (source.morphology.ellipticity[0], norm * np.cos(2 * theta), errors[base + "morphology.ellipticity"][0]),
        "e2": (source.morphology.ellipticity[1], norm * np.sin(2 * theta), errors[base + "morphology.ellipticity"][1]),
    }
    for n, name in enumerate(fluxes):
        truth[f"flux {name}"] = source.spectrum.flux[n], fluxes[name], errors[base + "spectrum.flux"][n]
    return {name: float((value - true) / error) for name, (value, true, error) in truth.items()}


if __name__ == "__main__":
    main()
