"""Settings for all tests: eight devices, a compilation cache on disk, no implicit rank promotion."""

import importlib
import os
import pathlib

# Before NumPy and scikit-learn are imported: threads of several tests at once on few cores wait for each other.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import helpers
import jax
import pytest

# Most of the time of the tests goes into compiling programs that run once. So XLA optimises little, and they take less
# than half of the time. JAXHESS_TEST_XLA=default compiles as users do; `make test-all` sets it. Children inherit both.
QUICK = ["backend_optimization_level=0", "llvm_disable_expensive_passes=true", "cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):  # later ones stop at this flag, which they do not know
    QUICK.append("cpu_use_fusion_emitters=false")
if os.environ.get("JAXHESS_TEST_XLA") != "default":
    os.environ["XLA_FLAGS"] = " ".join([*(f"--xla_{flag}" for flag in QUICK), os.environ.get("XLA_FLAGS", "")])

CACHE = pathlib.Path(os.environ.get("JAXHESS_TEST_CACHE", pathlib.Path(__file__).parent.parent / ".cache" / "jax"))

jax.config.update("jax_num_cpu_devices", 8)  # what says nothing of devices runs on the first alone
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_numpy_rank_promotion", "raise")
if not hasattr(jax, "enable_x64"):  # its name before JAX 0.8
    jax.enable_x64 = importlib.import_module("jax.experimental").enable_x64


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs go after each file: a process may hold 65,530 pieces of memory, and all files need as many."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def start():
    """`helpers.processes` for one test."""
    with helpers.processes() as popen:
        yield popen


@pytest.fixture(scope="session")
def data_dir():
    """The folder of the real data sets; tests that need it are skipped where none is given, or fail if required."""
    path = os.environ.get("JAXHESS_DATA_DIR")
    if path:
        return path
    if os.environ.get("JAXHESS_REQUIRE_DATA"):
        pytest.fail("JAXHESS_REQUIRE_DATA is set, but JAXHESS_DATA_DIR is not")
    pytest.skip("JAXHESS_DATA_DIR is not set")
