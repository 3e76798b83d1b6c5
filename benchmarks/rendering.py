"""Rendering: how close to GalSim, and how fast against the bare Fourier transforms.

    python benchmarks/rendering.py                      # both, the speed on the packaged demo field
    python benchmarks/rendering.py --field other.fits   # speed on another multi-instrument file
    python benchmarks/rendering.py --peer-python PYTHON # scarlet2 beside it, from an environment that has it
    python benchmarks/rendering.py --json               # the same, then one JSON line

Accuracy. GalSim draws sources onto an observation directly, each convolved with PSF and pixel and with the local WCS
at its position. scenefit is given what a fit has: an image of the galaxy on the model frame (drawn by GalSim through
the model PSF, without pixel) and a stamp of the observed PSF. Two kinds of galaxy are drawn: a Gaussian one and a
clumpy one (exponential disc, bulge and knots down to a sigma of one model pixel); and a point source, a
`PointMorphology` here. Errors are the largest difference
over the peak and the relative difference of the total flux, over the pixels inside the frame. The distorted cases have
a SIP polynomial that changes the pixel scale by 0.2 % from the centre to the edge of the image (ACS over this width),
and a galaxy off the centre.

Speed. The model image of the bands of the instrument with the largest pixels is rendered onto these pixels, jitted and
warm; beside it stand the transforms this needs at least: the padded model planes forwards, the modes that the
instrument can see backwards. Medians of alternating runs in one process.

Peer. With `--peer-python`, scarlet2's native renderer (peers/scarlet2_native.py) renders the same observation from the
same model grid and channels right afterwards, alone in a process of its own, also jitted and warm. Both take the model
image in its pixels, and both count all that has to be done anew for every model: their transform of it, the convolution
from model to observed PSF, and sampling at the observed pixels. What is done once at `match` is given apart. The ratio
is the peer's time over scenefit's. Only times are compared, not where the light lands.
"""

import argparse
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import galsim
import jax
import jax.numpy as jnp
import numpy as np
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS

from scenefit.data.observation import Observation
from scenefit.model.morphology import PointMorphology
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import MODEL_PSF_SIGMA, Frame
from scenefit.sky.psf import ImagePSF

PEER = Path(__file__).parent / "peers" / "scarlet2_native.py"
DEFAULT_FIELD = Path(__file__).resolve().parents[1] / "src/scenefit/app/data/demo_field.fits"
MODEL_SCALE_ARCSEC = 0.03
FRAME_PIXELS = 320
FIELD_ARCSEC = 8.0
PSF_PIXELS = 41
CENTER_DEG = (150.3, 2.05)
RATIOS, ROTATIONS_DEG = (1.0, 2.0, 5.6), (0.0, 23.0, 90.0)
FLIPS = {"": (1, 1), "x": (-1, 1), "y": (1, -1), "xy": (-1, -1)}
SUBPIXEL = (0.31, -0.42)
SIP_SCALE_CHANGE = 2e-3
KINDS = ("gaussian", "clumpy", "point")
# GalSim's defaults aim at 0.5 %; these at 1e-5 of the flux.
ACCURATE = galsim.GSParams(
    folding_threshold=1e-5, maxk_threshold=1e-6, kvalue_accuracy=1e-8, xvalue_accuracy=1e-8, maximum_fft_size=16384
)


@dataclass(frozen=True)
class Case:
    """How an observation's pixels lie on the model's.

    Parameters
    ----------
    ratio : float
        Observed pixel in model pixels.
    rotation_deg : float
        Angle of the observed axes against the model's.
    flip : str
        Axes that run the other way: "", "x", "y" or "xy".
    subpixel : bool
        Whether the pixel centres are out of step with the model's, by a fraction of an observed pixel.
    distorted : bool
        Whether the WCS has a SIP polynomial; the galaxy then lies off the centre.
    """

    ratio: float
    rotation_deg: float = 0.0
    flip: str = ""
    subpixel: bool = False
    distorted: bool = False

    @property
    def scale_arcsec(self) -> float:
        """Side of an observed pixel."""
        return MODEL_SCALE_ARCSEC * self.ratio

    @property
    def num_pixels(self) -> int:
        """Pixels along either side of the observation; even, as the frame, so that centres coincide."""
        return 2 * round(FIELD_ARCSEC / self.scale_arcsec / 2)

    def header(self) -> fits.Header:
        """Return the WCS of the observation."""
        crpix = (self.num_pixels + 1) / 2 + np.array(SUBPIXEL if self.subpixel else (0.0, 0.0))
        header = tangent_header(self.num_pixels, self.scale_arcsec, self.rotation_deg, FLIPS[self.flip], crpix)
        if self.distorted:
            quadratic = SIP_SCALE_CHANGE / self.num_pixels
            header["CTYPE1"], header["CTYPE2"] = "RA---TAN-SIP", "DEC--TAN-SIP"
            header["A_ORDER"], header["B_ORDER"] = 2, 2
            header["A_2_0"], header["A_1_1"], header["B_0_2"] = quadratic, -0.5 * quadratic, 0.7 * quadratic
        return header


@dataclass(frozen=True)
class Errors:
    """Largest error over the peak, and relative error of the total flux."""

    image: float
    flux: float


def tangent_header(
    num_pixels: int, scale_arcsec: float, rotation_deg: float = 0.0, flip=(1, 1), crpix=None
) -> fits.Header:
    """Return the header of a square tangent-plane image around the field's centre; unless flipped, x points west."""
    angle = np.deg2rad(rotation_deg)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = scale_arcsec / 3600 * np.diag([-1.0, 1.0]) @ turn @ np.diag(flip)
    header = fits.Header({"NAXIS": 2, "NAXIS1": num_pixels, "NAXIS2": num_pixels, "RADESYS": "ICRS"})
    for axis, ctype in enumerate(("RA---TAN", "DEC--TAN")):
        header[f"CTYPE{axis + 1}"] = ctype
        header[f"CRVAL{axis + 1}"] = CENTER_DEG[axis]
        header[f"CRPIX{axis + 1}"] = (num_pixels + 1) / 2 if crpix is None else crpix[axis]
    for i, j in np.ndindex(2, 2):
        header[f"CD{i + 1}_{j + 1}"] = matrix[i, j] + 0.0
    return header


def make_profile(kind: str) -> galsim.GSObject:
    """Return a source of unit flux on the sky, in arcsec: "gaussian", "clumpy" or "point"."""
    pixel = MODEL_SCALE_ARCSEC
    if kind == "point":
        return galsim.DeltaFunction(gsparams=ACCURATE)
    if kind == "gaussian":
        return galsim.Gaussian(sigma=5 * pixel, gsparams=ACCURATE).shear(g1=0.2, g2=-0.15)
    rng = np.random.default_rng(7)
    disc = galsim.Exponential(scale_radius=7 * pixel, gsparams=ACCURATE).shear(g1=-0.25, g2=0.1) * 0.55
    bulge = galsim.Gaussian(sigma=2.5 * pixel, gsparams=ACCURATE) * 0.2
    knots = [
        galsim.Gaussian(sigma=sigma * pixel, gsparams=ACCURATE).shift(*(pixel * rng.normal(0, 10, 2))) * 0.025
        for sigma in rng.uniform(1.0, 2.0, 10)
    ]
    return galsim.Sum([disc, bulge, *knots])


def make_psf(scale_arcsec: float) -> galsim.GSObject:
    """Return an elliptical PSF with wings, without pixel, in arcsec, for a camera of that pixel scale."""
    core = galsim.Gaussian(sigma=1.4 * scale_arcsec, gsparams=ACCURATE) * 0.8
    wings = galsim.Gaussian(sigma=2.8 * scale_arcsec, gsparams=ACCURATE) * 0.2
    return galsim.Sum([core, wings]).shear(g1=0.05, g2=0.03)


def draw(profile: galsim.GSObject, header: fits.Header, position: galsim.CelestialCoord, method: str) -> np.ndarray:
    """Draw a profile at a position on the sky, with the WCS of the header as it is there."""
    wcs = galsim.GSFitsWCS(header=header)
    center = wcs.toImage(position)
    image = galsim.ImageD(header["NAXIS1"], header["NAXIS2"])
    profile.drawImage(image, wcs=wcs.local(center), center=center, method=method)
    return image.array


def draw_psf(header: fits.Header) -> np.ndarray:
    """Draw the PSF in the middle of a stamp, with the pixels in the middle of the image of the header."""
    wcs = galsim.GSFitsWCS(header=header)
    middle = galsim.PositionD((header["NAXIS1"] + 1) / 2, (header["NAXIS2"] + 1) / 2)
    local = wcs.local(middle)
    stamp = galsim.ImageD(PSF_PIXELS, PSF_PIXELS)
    make_psf(np.sqrt(local.pixelArea())).drawImage(stamp, wcs=local, method="auto")
    return stamp.array


def render_case(case: Case, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the observation as scenefit renders it and as GalSim draws it, both 0 outside the model frame."""
    profile, observed = make_profile(kind), case.header()
    off_center = galsim.PositionD(1.1, -0.9) if case.distorted else galsim.PositionD(0.13, 0.07)
    middle = galsim.CelestialCoord(*(angle * galsim.degrees for angle in CENTER_DEG))
    position = middle.deproject(off_center.x * galsim.arcsec, off_center.y * galsim.arcsec)
    model_header = tangent_header(FRAME_PIXELS, MODEL_SCALE_ARCSEC)
    frame = Frame((FRAME_PIXELS,) * 2, channels="i", wcs=model_header, padding=round(PSF_PIXELS * case.ratio / 2))
    if kind == "point":
        sky = SkyCoord(position.ra.deg, position.dec.deg, unit="deg")
        model = Scene(frame, [Source(sky, [1.0], PointMorphology())]).evaluate()[0]
    else:
        narrow = galsim.Gaussian(sigma=MODEL_PSF_SIGMA * MODEL_SCALE_ARCSEC, gsparams=ACCURATE)
        model = draw(galsim.Convolve(profile, narrow), model_header, position, "no_pixel")
    truth = draw(galsim.Convolve(profile, make_psf(case.scale_arcsec)), observed, position, "auto")
    observation = Observation(truth, weights=1.0, psf=ImagePSF(draw_psf(observed)), wcs=observed, channels="i")
    matched = observation.match(frame)
    seen = np.zeros(truth.shape, dtype=bool)
    seen[matched.renderer.window.slices] = matched.renderer.inside
    return matched.render(model[None])[0], np.where(seen, truth, 0.0)


def measure_errors(case: Case, kind: str) -> Errors:
    """Compare scenefit with GalSim for one geometry and galaxy."""
    rendered, truth = render_case(case, kind)
    return Errors(
        image=float(np.abs(rendered - truth).max() / truth.max()),
        flux=float(abs(rendered.sum() / truth.sum() - 1)),
    )


def all_cases() -> Iterator[Case]:
    """Yield every geometry of the accuracy table."""
    for ratio, rotation, flip, subpixel in itertools.product(RATIOS, ROTATIONS_DEG, FLIPS, (False, True)):
        yield Case(ratio, rotation, flip, subpixel)
    for ratio, rotation in itertools.product(RATIOS, ROTATIONS_DEG):
        yield Case(ratio, rotation, subpixel=True, distorted=True)


def print_accuracy() -> tuple[list[dict], Errors]:
    """Print the accuracy table; return its rows and the worst of each kind of error."""
    print("ratio  rotation  flip  sub-pixel  SIP  " + "  ".join(f"{kind:>8}: image     flux" for kind in KINDS))
    rows, found = [], []
    for case in all_cases():
        errors = {kind: measure_errors(case, kind) for kind in KINDS}
        found += errors.values()
        rows.append({**asdict(case), **{kind: asdict(error) for kind, error in errors.items()}})
        subpixel, distorted = ("yes" if flag else "-" for flag in (case.subpixel, case.distorted))
        print(
            f"{case.ratio:5.1f}  {case.rotation_deg:8.0f}  {case.flip or '-':>4}  {subpixel:>9}  {distorted:>3}  "
            + "  ".join(f"{error.image:16.1e}  {error.flux:7.1e}" for error in errors.values())
        )
    worst = Errors(max(error.image for error in found), max(error.flux for error in found))
    print(f"worst: {worst.image:.1e} of the peak (wanted: 1e-3), total flux {worst.flux:.1e} (wanted: 1e-4)")
    return rows, worst


def read_field(path: Path) -> list[Observation]:
    """Read the images, weights and PSFs of a multi-instrument file; channels are numbered per instrument."""
    with fits.open(path) as hdus:
        names = [hdu.name.removesuffix("_OBS") for hdu in hdus if hdu.name.endswith("_OBS")]
        return [
            Observation(
                hdus[f"{name}_OBS"].data,
                weights=hdus[f"{name}_WEIGHTS"].data,
                psf=ImagePSF(hdus[f"{name}_PSF"].data, center="peak"),
                wcs=WCS(hdus[f"{name}_OBS"].header, naxis=2),
                channels=[f"{name}{c}" for c in range(len(np.atleast_3d(hdus[f"{name}_OBS"].data.T).T))],
                name=name,
            )
            for name in names
        ]


def median_seconds(functions: dict[str, Callable[[], jax.Array]], repeats: int) -> dict[str, float]:
    """Return the median run time of each function, run in turn after a first run that isn't counted."""
    for function in functions.values():
        jax.block_until_ready(function())
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def run_peer(python: str, path: Path, name: str, frame: Frame) -> dict:
    """Return scarlet2's figures for the rendering of the named observation from the grid of a frame."""
    header = frame.wcs.to_header()
    header["NAXIS1"], header["NAXIS2"] = frame.box.shape[::-1]
    with tempfile.TemporaryDirectory() as folder:
        grid = Path(folder) / "frame.txt"
        grid.write_text(header.tostring(sep="\n", endcard=False, padding=False))
        command = [python, str(PEER), str(path), "--observation", name, "--frame", str(grid)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def print_speed(path: Path, repeats: int, peer_python: str | None) -> dict:
    """Print and return the time of a native rendering, of its bare Fourier transforms and of scarlet2's rendering."""
    observations = read_field(path)
    union = Frame.from_observations(observations)
    coarse = max(observations, key=lambda obs: Frame.from_observations([obs]).pixel_scale)
    frame = Frame(union.box.shape, channels=coarse.channels, wcs=union.wcs, psf=union.psf, padding=union.padding)
    start = time.perf_counter()
    renderer = coarse.match(frame).renderer
    match_seconds = time.perf_counter() - start
    model = jax.random.uniform(jax.random.key(0), frame.shape)
    modes = jnp.zeros((len(coarse.channels), *renderer.num_modes), jnp.complex64)

    render = jax.jit(lambda renderer, model, shift: renderer(renderer.transform(model), shift))
    forward = jax.jit(lambda model: renderer.transform(model))
    backward = jax.jit(lambda modes: jnp.fft.irfft2(modes, norm="forward"))
    seconds = median_seconds(
        {
            "render": lambda: render(renderer, model, jnp.zeros(2)),
            "forward": lambda: forward(model),
            "backward": lambda: backward(modes),
        },
        repeats,
    )
    bare = seconds["forward"] + seconds["backward"]
    result = {
        "field": path.name,
        "observation": coarse.name,
        "model_shape": list(frame.shape),
        "observed_shape": list(coarse.shape),
        "fft_shape": list(frame.fft_shape),
        "num_modes": list(renderer.num_modes),
        "sampling": type(renderer.sampling).__name__,
        "match_ms": 1e3 * match_seconds,
        "render_ms": 1e3 * seconds["render"],
        "forward_fft_ms": 1e3 * seconds["forward"],
        "backward_fft_ms": 1e3 * seconds["backward"],
        "ratio": seconds["render"] / bare,
    }
    print(
        f"{path.name}: model {frame.shape} (padded {frame.fft_shape}) to {coarse.name} {coarse.shape}, "
        f"{result['sampling']}, {renderer.num_modes} modes\n"
        f"rendering {result['render_ms']:.3f} ms; bare FFTs {1e3 * bare:.3f} ms "
        f"({result['forward_fft_ms']:.3f} forwards, {result['backward_fft_ms']:.3f} backwards); "
        f"ratio {result['ratio']:.2f} (wanted: 2); "
        f"matching once {result['match_ms']:.0f} ms"
    )
    if peer_python:
        peer = result["peer"] = run_peer(peer_python, path, coarse.name, frame)
        result["peer_ratio"] = peer["render_ms"] / result["render_ms"]
        print(
            f"scarlet2's {peer['renderer']}, model {tuple(peer['model_shape'])}: rendering {peer['render_ms']:.1f} ms, "
            f"{result['peer_ratio']:.0f} times as long; matching once {peer['match_ms']:.0f} ms"
        )
    return result


def main() -> None:
    """Print accuracy and speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--field", type=Path, default=DEFAULT_FIELD, help="multi-instrument file for the speed")
    parser.add_argument("--repeats", type=int, default=300, help="runs that the median is taken of")
    parser.add_argument("--skip-accuracy", action="store_true", help="measure the speed only")
    parser.add_argument("--peer-python", help="Python of an environment with scarlet2")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    options = parser.parse_args()
    result = {}
    if not options.skip_accuracy:
        result["accuracy"], worst = print_accuracy()
        result["worst"] = asdict(worst)
    result["speed"] = print_speed(options.field, options.repeats, options.peer_python)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
