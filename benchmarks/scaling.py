"""How a fit scales with the number of sources.

    python scaling.py [--sources 8 32 128 1000] [--peer-python PYTHON] [--peer-limit 128] [--converge] [--json]

Simulated fields of five bands on one grid, 31-pixel stamps, one observation: 8 sources on 128x128, 32 on 256x256, 128
on 512x512, 1000 on 1024x1024. First step: from the call of `fit` to the end of its first step, compilation included.
Step: one forward and one adjoint rendering, which is what a step of a first-order method takes. Bare: the Fourier
transforms that these need (two forward, two inverse), alone. With `--peer-python`, scarlet2 runs the same fields in its
own environment, one after the other, up to `--peer-limit` sources: its first step takes minutes with 128 sources, and
far longer with more.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import scenefit as sf

CHANNELS = tuple("grizy")
SIZES = {8: 128, 32: 256, 128: 512, 1000: 1024}
PSF_SIGMA, NOISE, HALF_STAMP = 1.7, 0.3, 15
PEER = pathlib.Path(__file__).parent / "peers" / "scarlet2_scaling.py"


def field_size(num_sources: int) -> int:
    """Return the side of the field: as crowded as 128 sources on 512 x 512 where it isn't listed."""
    return SIZES.get(num_sources, int(np.ceil(np.sqrt(num_sources / 128) * 512)))


def simulate(num_sources: int, size: int) -> dict[str, np.ndarray]:
    """Return Gaussian galaxies with white noise: data (channel, y, x), PSF, positions (y, x), fluxes (source, channel)."""
    rng = np.random.default_rng(0)
    margin = min(25, size // 4)
    centers = rng.uniform(margin, size - margin, (num_sources, 2))
    fluxes = 10 ** rng.uniform(1.5, 3, num_sources)
    colors = rng.uniform(0.5, 1.5, (num_sources, len(CHANNELS)))
    sigmas = rng.uniform(2.0, 4.0, num_sources)
    image = rng.normal(0, NOISE, (len(CHANNELS), size, size))
    for (cy, cx), flux, color, sigma in zip(centers, fluxes, colors, sigmas, strict=True):
        y0, x0 = max(0, int(cy) - 24), max(0, int(cx) - 24)
        window = np.s_[y0 : int(cy) + 25, x0 : int(cx) + 25]
        y, x = np.mgrid[window][:, : size - y0, : size - x0]
        variance = sigma**2 + PSF_SIGMA**2
        profile = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 2 / variance) / (2 * np.pi * variance)
        image[(slice(None), *window)] += flux * color[:, None, None] * profile
    grid = np.arange(-15, 16)
    psf = np.exp(-(grid[:, None] ** 2 + grid**2) / 2 / PSF_SIGMA**2)
    return {"data": image, "psf": psf / psf.sum(), "centers": centers, "fluxes": fluxes[:, None] * colors}


def bare_transforms(shape: tuple[int, int, int], repeats: int = 15) -> float:
    """Return the seconds of the Fourier transforms of one forward and one adjoint rendering on one grid."""

    @jax.jit
    def run(image):
        for _ in range(2):
            image = jnp.fft.irfft2(jnp.fft.rfft2(image), s=shape[1:])
        return image

    image = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    run(image).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(image).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def measure(num_sources: int, converge: bool) -> dict:
    """Fit one field; return its figures."""
    size = field_size(num_sources)
    field = simulate(num_sources, size)
    observation = sf.Observation(field["data"], sigma=NOISE, psf=field["psf"], channels=CHANNELS, name="survey")
    frame = sf.Frame.from_observations([observation])
    start = time.perf_counter()
    scene = sf.initialize(frame, [observation], field["centers"], model="pixel", half_size=HALF_STAMP)
    initialized = time.perf_counter() - start
    steps: list[tuple[int, float]] = []
    result = sf.fit(
        scene,
        [observation],
        progress=False,
        max_steps=100 if converge else 8,
        callback=lambda _, row: steps.append((row["products"], row["seconds"])),
    )
    products, seconds = np.array(steps).T
    # Later steps only: the first holds the compilation.
    step = float(np.median(np.diff(seconds) / np.diff(products)))
    bare = bare_transforms((len(CHANNELS), *frame.fft_shape))
    return {
        "num_sources": num_sources,
        "size": size,
        "initialize_s": round(initialized, 3),
        "first_step_s": round(float(seconds[0]), 3),
        "step_ms": round(1e3 * step, 3),
        "bare_ms": round(1e3 * bare, 3),
        "step_over_bare": round(step / bare, 2),
        "status": result.status.name,
        "fit_s": round(result.timing["fit"], 2),
        "num_steps": result.num_steps,
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def run_apart(num_sources: int, converge: bool) -> dict:
    """Measure in a process of its own, so that neither compilation nor memory carry over."""
    command = [sys.executable, __file__, "--worker", str(num_sources), *(["--converge"] if converge else [])]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def run_peer(python: str, num_sources: int) -> dict:
    """Run scarlet2 on the same field; return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/field.npz"
        np.savez(path, **simulate(num_sources, field_size(num_sources)), channels=CHANNELS, sigma=NOISE)
        output = subprocess.run([python, str(PEER), path], check=True, capture_output=True, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def main():
    """Print a table, and with --json one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, nargs="+", default=[8, 32, 128, 1000])
    parser.add_argument("--peer-python", help="Python of an environment with scarlet2")
    parser.add_argument("--peer-limit", type=int, default=128, help="most sources that scarlet2 is run with")
    parser.add_argument("--converge", action="store_true", help="fit until converged instead of 8 steps")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*leap-second.*")
    if options.worker is not None:
        print(json.dumps(measure(options.worker, options.converge)))
        return
    print(f"{'sources':>8}{'size':>7}{'first step':>12}{'step':>10}{'bare FFTs':>11}{'ratio':>7}{'memory':>10}  peer")
    rows = []
    for count in options.sources:
        row = run_apart(count, options.converge)
        if options.peer_python and count <= options.peer_limit:
            row["peer"] = run_peer(options.peer_python, count)
        peer = row.get("peer")
        told = f"{peer['first_step_s']:.1f} s, {peer['step_ms']:.1f} ms" if peer else ""
        print(
            f"{count:>8}{row['size']:>7}{row['first_step_s']:>10.2f} s{row['step_ms']:>7.1f} ms{row['bare_ms']:>8.1f} ms"
            f"{row['step_over_bare']:>7.2f}{row['peak_memory_mb']:>7.0f} MB  {told}  {row['status']} {row['fit_s']} s",
            flush=True,
        )
        rows.append(row)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
