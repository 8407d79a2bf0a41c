"""Two processes that share one net and one batch, as two hosts would: the numbers of one process."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import test_sharding as shared
from helpers import distance, processes

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path_factory.mktemp("distributed") / "found.npz"
    path = os.pathsep.join(map(str, (HERE, HERE.parent)))
    environment = {**os.environ, "PYTHONPATH": path, "JAXHESS_TEST_CACHE": jax.config.jax_compilation_cache_dir}
    with processes() as start:
        workers = [
            start(
                [sys.executable, str(HERE / "distributed_worker.py"), str(number), "2", str(port), str(out)],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]
        errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    return dict(np.load(out))


def test_two_processes_give_the_numbers_of_one(of_two_processes):
    expected = shared.results(shared.P.params, shared.BATCH) | shared.htr_steps(shared.P.params, shared.BATCH)
    assert set(of_two_processes) == set(expected)
    for name, value in expected.items():
        assert distance(np.ravel(of_two_processes[name]), np.ravel(value)) < 3e-4, name
