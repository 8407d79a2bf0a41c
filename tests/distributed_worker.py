"""One of several processes that compute a net's curvature together; started by test_distributed.py."""

import os
import sys

import jax
import numpy as np

number, count, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_compilation_cache_dir", os.environ["JAXHESS_TEST_CACHE"])
jax.distributed.initialize(f"localhost:{port}", count, number)

import test_sharding as shared  # noqa: E402  # JAX must know of the other processes first
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))


def spread(x, spec):
    """A global array of which this process holds its part, from a whole that every process has."""
    return jax.make_array_from_callback(np.shape(x), NamedSharding(mesh, spec), lambda index: np.asarray(x)[index])


def last_axis(x):
    return PartitionSpec(*[None] * (x.ndim - 1), "model") if x.shape[-1] % 2 == 0 else PartitionSpec()


params = jax.tree.map(lambda x: spread(x, last_axis(x)), shared.P.params)
batch = jax.tree.map(lambda x: spread(x, PartitionSpec("data")), shared.BATCH)
assert not jax.tree.leaves(batch)[0].is_fully_addressable
found = shared.results(params, batch) | shared.htr_steps(params, batch)
if number == 0:
    np.savez(out, **found)
