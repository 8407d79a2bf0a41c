"""Curvature of neural networks in JAX, layer by layer."""

import jaxhess._versions as _versions
from jaxhess.batches import Batches as Batches
from jaxhess.distances import count_outliers as count_outliers
from jaxhess.distances import jensen_shannon as jensen_shannon
from jaxhess.distances import kl_divergence as kl_divergence
from jaxhess.distances import wasserstein as wasserstein
from jaxhess.lanczos import Tridiagonal as Tridiagonal
from jaxhess.lanczos import lanczos as lanczos
from jaxhess.lanczos import top_eigenpairs as top_eigenpairs
from jaxhess.layers import layer_names as layer_names
from jaxhess.layers import middle_layers as middle_layers
from jaxhess.layers import subtree as subtree
from jaxhess.objective import CrossEntropy as CrossEntropy
from jaxhess.objective import Objective as Objective
from jaxhess.objective import SquaredError as SquaredError
from jaxhess.objective import cross_entropy as cross_entropy
from jaxhess.objective import squared_error as squared_error
from jaxhess.operators import functional_hessian as functional_hessian
from jaxhess.operators import ggn as ggn
from jaxhess.operators import hessian as hessian
from jaxhess.operators import linearize as linearize
from jaxhess.regularizer import hessian_trace_penalty as hessian_trace_penalty
from jaxhess.spectrum import Spectrum as Spectrum
from jaxhess.spectrum import layer_spectra as layer_spectra
from jaxhess.spectrum import spectrum as spectrum
from jaxhess.structure import ClassStructure as ClassStructure
from jaxhess.structure import class_structure as class_structure
from jaxhess.structure import ggn_eigenvalues as ggn_eigenvalues
from jaxhess.structure import layer_class_structures as layer_class_structures
from jaxhess.summary import Record as Record
from jaxhess.summary import Summary as Summary
from jaxhess.summary import summarize as summarize
from jaxhess.trace import Estimate as Estimate
from jaxhess.trace import layer_traces as layer_traces
from jaxhess.trace import trace as trace
from jaxhess.transform import HessianTraceState as HessianTraceState
from jaxhess.transform import add_hessian_trace as add_hessian_trace

_versions.turn_off_stale_matrices()
