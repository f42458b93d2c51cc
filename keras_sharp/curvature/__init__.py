"""The curvature of the loss: eigenvalues, trace and spectrum of the Hessian of a model."""

from keras_sharp.curvature.blocks import PerLayer, per_layer
from keras_sharp.curvature.certificate import Certificate
from keras_sharp.curvature.density import SpectralDensity, spectral_density
from keras_sharp.curvature.eigen import Eigenvalues, eigenvalues, sharpness_ratio
from keras_sharp.curvature.estimates import Estimate, frobenius_norm, hutch_plus_plus, trace
from keras_sharp.curvature.operators import GaussNewtonOperator, HessianOperator

__all__ = [
    "Certificate",
    "Eigenvalues",
    "Estimate",
    "GaussNewtonOperator",
    "HessianOperator",
    "PerLayer",
    "SpectralDensity",
    "eigenvalues",
    "frobenius_norm",
    "hutch_plus_plus",
    "per_layer",
    "sharpness_ratio",
    "spectral_density",
    "trace",
]
