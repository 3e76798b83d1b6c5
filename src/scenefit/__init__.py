"""One model fitted jointly to images of different instruments, each in its own pixels."""

from scenefit.app import datasets, plot
from scenefit.app.io import read_catalog, read_observations
from scenefit.app.serialization import load, save
from scenefit.data.noise import WhiteNoise
from scenefit.data.observation import Astrometry, Observation
from scenefit.infer.fit import FitResult, Status, fit
from scenefit.model.morphology import GaussianMorphology, PixelMorphology, PointMorphology
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.model.spectrum import ArraySpectrum, StaticSpectrum, TransientSpectrum
from scenefit.sky.frame import Frame
from scenefit.sky.psf import GaussianPSF, ImagePSF
from scenefit.survey.catalog import catalog, offset_errors
from scenefit.survey.initialize import initialize

__all__ = [
    "ArraySpectrum",
    "Astrometry",
    "CompositeSource",
    "FitResult",
    "Frame",
    "GaussianMorphology",
    "GaussianPSF",
    "ImagePSF",
    "Observation",
    "Parameters",
    "PixelMorphology",
    "PointMorphology",
    "Scene",
    "Source",
    "StaticSpectrum",
    "Status",
    "TransientSpectrum",
    "WhiteNoise",
    "catalog",
    "datasets",
    "fit",
    "initialize",
    "load",
    "offset_errors",
    "plot",
    "read_catalog",
    "read_observations",
    "save",
]
