"""What is held: a whole data set takes the memory of one batch, a density that of a few vectors."""

import dataclasses
import subprocess
import sys
import tracemalloc
from collections.abc import Callable

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhess as jh


def held():
    """Bytes of all arrays on the devices."""
    return sum(x.nbytes for x in jax.live_arrays())


@dataclasses.dataclass(frozen=True)
class Made:
    """Batches of images that are made when they are asked for."""

    count: int
    size: int
    asked: Callable[[], object] = lambda: None

    def __iter__(self):
        for seed in range(self.count):
            self.asked()
            rng = np.random.default_rng(seed)
            x = rng.standard_normal((self.size, 1, 28, 28), np.float32)
            yield {"x": x, "label": rng.integers(10, size=self.size, dtype=np.int32)}


@pytest.mark.parametrize("kind", [jh.hessian, jh.ggn])
def test_no_more_batches_are_on_the_device_the_more_there_are(kind):
    p, most = helpers.problem("lenet"), {}
    v = jax.tree.map(jnp.ones_like, p.params)
    for count in (2, 12):
        seen, before = [], held()
        made = Made(count, 50, lambda seen=seen: seen.append(held()))
        jax.block_until_ready(kind(p.objective, p.params, jh.Batches(made))(v))
        assert len(seen) >= count
        most[count] = max(seen) - before
    vectors = 4 * len(helpers.ravel(p.params))
    assert most[12] <= most[2] + 2 * vectors


def test_a_density_holds_a_few_vectors():
    size, seen = 200_000, {}
    eigenvalues = jnp.linspace(0, 1, size)
    start = jax.random.normal(jax.random.key(0), (size,))
    for basis in (False, True):
        before, seen[basis] = held(), []

        def operator(v, before=before, counts=seen[basis]):
            counts.append((held() - before + tracemalloc.get_traced_memory()[0]) / v.nbytes)
            return eigenvalues * v

        tracemalloc.start()  # what numpy holds, which has the basis on a CPU
        jh.lanczos(operator, start, 100, reorthogonalize=basis)
        tracemalloc.stop()
    assert max(seen[False]) < 6
    assert max(seen[True]) > 100  # so that this does tell


WHOLE = """
import resource, helpers, jax, jax.numpy as jnp, jaxhess as jh, test_memory
p = helpers.problem("lenet")
made = test_memory.Made({count}, 1000)
operator = jh.{kind}(p.objective, p.params, jh.Batches(made) if {count} > 1 else next(iter(made)))
for _ in range(2):
    jax.block_until_ready(operator(jax.tree.map(jnp.ones_like, p.params)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_50000_examples_in_the_memory_of_a_batch(kind, request):
    """The peak of the whole process, that of one batch of 1,000 against 50 of them."""

    def peak(count):
        program = WHOLE.format(kind=kind, count=count)
        options = dict(cwd=request.path.parent, capture_output=True, text=True, check=True)
        return int(subprocess.run([sys.executable, "-c", program], **options).stdout)

    assert peak(50) <= 1.1 * peak(1)
