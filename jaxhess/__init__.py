"""Curvature of neural networks in JAX, layer by layer."""

from importlib.metadata import version as _version

from jaxhess import _versions
from jaxhess._lanczos import Tridiagonal, lanczos
from jaxhess.batches import Batches
from jaxhess.classes import ClassStructure, class_structure, layer_class_structures
from jaxhess.criteria import CrossEntropy, SquaredError, cross_entropy, squared_error
from jaxhess.eigenpairs import top_eigenpairs
from jaxhess.gram import ggn_eigenvalues
from jaxhess.layers import layer_names, middle_layers, subtree
from jaxhess.objective import Criterion, Objective
from jaxhess.operators import aslinearoperator, functional_hessian, ggn, hessian, linearize
from jaxhess.quadrature import layer_spectra, spectrum
from jaxhess.regularizer import hessian_trace_penalty
from jaxhess.spectra import Spectrum, count_outliers, jensen_shannon, kl_divergence, wasserstein
from jaxhess.summary import Record, Summary, summarize
from jaxhess.traces import Estimate, layer_traces, trace
from jaxhess.transform import HessianTraceState, add_hessian_trace

__version__ = _version("jaxhess")
__all__ = [
    "Batches",
    "ClassStructure",
    "Criterion",
    "CrossEntropy",
    "Estimate",
    "HessianTraceState",
    "Objective",
    "Record",
    "Spectrum",
    "SquaredError",
    "Summary",
    "Tridiagonal",
    "add_hessian_trace",
    "aslinearoperator",
    "class_structure",
    "count_outliers",
    "cross_entropy",
    "functional_hessian",
    "ggn",
    "ggn_eigenvalues",
    "hessian",
    "hessian_trace_penalty",
    "jensen_shannon",
    "kl_divergence",
    "lanczos",
    "layer_class_structures",
    "layer_names",
    "layer_spectra",
    "layer_traces",
    "linearize",
    "middle_layers",
    "spectrum",
    "squared_error",
    "subtree",
    "summarize",
    "top_eigenpairs",
    "trace",
    "wasserstein",
]

_versions.turn_off_stale_matrices()
