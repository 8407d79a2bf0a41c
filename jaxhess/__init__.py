"""Curvature of neural networks in JAX, layer by layer.

Start here: `summarize` measures every layer and the whole net, and prints as a table.

- Problem: `Objective`, `Criterion`, `CrossEntropy`, `cross_entropy`, `SquaredError`, `squared_error`, `Logits`,
  `Batches`
- Layers and groups: `layer_names`, `middle_layers`, `part`, `subtree`
- Products: `hessian`, `ggn`, `functional_hessian`, `linearize`, `aslinearoperator`, `precondition`,
  `preconditioner`
- Traces and diagonals: `layer_traces`, `trace`, `example_traces`, `diagonal`, `ggn_diagonal`
- Spectra: `layer_spectra`, `spectrum`, `lanczos`, `count_outliers`, `wasserstein`, `jensen_shannon`, `kl_divergence`
- Eigenvalues: `top_eigenpairs`, `subspace_overlap`, `critical_sharpness`, `ggn_eigenvalues`,
  `ggn_eigenpairs`
- Structure: `layer_interactions`, `class_structure`, `layer_class_structures`
- Penalty: `add_hessian_trace` and `add_noise_stability` (for optax), `hessian_trace_penalty`
- Results: `Summary`, `Record`, `Estimate`, `Spectrum`, `Interactions`, `ClassStructure`, `Tridiagonal`,
  `HessianTraceState`, `NoiseStabilityState`
- Modules: `jaxhess.plot` draws, `jaxhess.monitor` measures during training
"""

import importlib.metadata as _metadata

from jaxhess import _versions
from jaxhess._lanczos import Tridiagonal as Tridiagonal
from jaxhess._lanczos import lanczos as lanczos
from jaxhess.batches import Batches as Batches
from jaxhess.classes import ClassStructure as ClassStructure
from jaxhess.classes import class_structure as class_structure
from jaxhess.classes import layer_class_structures as layer_class_structures
from jaxhess.criteria import CrossEntropy as CrossEntropy
from jaxhess.criteria import SquaredError as SquaredError
from jaxhess.criteria import cross_entropy as cross_entropy
from jaxhess.criteria import squared_error as squared_error
from jaxhess.diagonals import diagonal as diagonal
from jaxhess.eigenpairs import subspace_overlap as subspace_overlap
from jaxhess.eigenpairs import top_eigenpairs as top_eigenpairs
from jaxhess.estimates import Estimate as Estimate
from jaxhess.gram import example_traces as example_traces
from jaxhess.gram import ggn_diagonal as ggn_diagonal
from jaxhess.gram import ggn_eigenpairs as ggn_eigenpairs
from jaxhess.gram import ggn_eigenvalues as ggn_eigenvalues
from jaxhess.interactions import Interactions as Interactions
from jaxhess.interactions import layer_interactions as layer_interactions
from jaxhess.layers import layer_names as layer_names
from jaxhess.layers import middle_layers as middle_layers
from jaxhess.logits import Logits as Logits
from jaxhess.objective import Criterion as Criterion
from jaxhess.objective import Objective as Objective
from jaxhess.operators import aslinearoperator as aslinearoperator
from jaxhess.operators import functional_hessian as functional_hessian
from jaxhess.operators import ggn as ggn
from jaxhess.operators import hessian as hessian
from jaxhess.operators import linearize as linearize
from jaxhess.preconditioning import precondition as precondition
from jaxhess.preconditioning import preconditioner as preconditioner
from jaxhess.quadrature import layer_spectra as layer_spectra
from jaxhess.quadrature import spectrum as spectrum
from jaxhess.regularizer import hessian_trace_penalty as hessian_trace_penalty
from jaxhess.selections import part as part
from jaxhess.selections import subtree as subtree
from jaxhess.sharpness import critical_sharpness as critical_sharpness
from jaxhess.spectra import Spectrum as Spectrum
from jaxhess.spectra import count_outliers as count_outliers
from jaxhess.spectra import jensen_shannon as jensen_shannon
from jaxhess.spectra import kl_divergence as kl_divergence
from jaxhess.spectra import wasserstein as wasserstein
from jaxhess.stability import NoiseStabilityState as NoiseStabilityState
from jaxhess.stability import add_noise_stability as add_noise_stability
from jaxhess.summary import Record as Record
from jaxhess.summary import Summary as Summary
from jaxhess.summary import summarize as summarize
from jaxhess.traces import layer_traces as layer_traces
from jaxhess.traces import trace as trace
from jaxhess.transform import HessianTraceState as HessianTraceState
from jaxhess.transform import add_hessian_trace as add_hessian_trace

__version__ = _metadata.version("jaxhess")
_versions.turn_off_faults()
