"""Two processes of four devices each, as two hosts would be: jax.distributed, one mesh, products over all of it."""

import os
import socket
import subprocess
import sys

_PROGRAM = """
import sys
import jax
port, number = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(number))

import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax_trirun
from jax_trirun.testing import MatmulProblem, matmul_float64

assert (jax.device_count(), jax.local_device_count(), jax.process_count()) == (8, 4, 2)
p = MatmulProblem(8, 512, 256, 64, with_zeros=True, scale_magnitude=0.1)
words = np.asarray(jax_trirun.pack(p.codes()))
arrays = (p.x(), words, p.scales(), p.zeros())
want = matmul_float64(p.x(), p.codes(), p.scales(), p.zeros())

def loss(x, scales, zeros, words):
    return jnp.sum(jnp.tanh(jax_trirun.matmul(x, words, scales, zeros)))

def local(array):  # this host's shards, with their places in the whole
    return [(shard.index, np.asarray(shard.data)) for shard in array.addressable_shards]

gradients = jax.grad(loss, (0, 1, 2))(*(jnp.asarray(arrays[i]) for i in (0, 2, 3, 1)))
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2, 4), ("host", "local"), (kind, kind))
    both = ("host", "local")
    ways = {  # rows over the hosts and K inside of one; K over all; N over all
        "rows and K": (P("host", "local"), P("local", None, None), P("local", None)),
        "K": (P(None, both), P(both, None, None), P(both, None)),
        "N": (P(None, None), P(None, both, None), P(None, both)),
    }
    for name, (x_spec, words_spec, scales_spec) in ways.items():
        specs = (x_spec, words_spec, scales_spec, scales_spec)
        there = [
            jax.make_array_from_callback(a.shape, NamedSharding(mesh, s), lambda index, a=a: a[index])
            for a, s in zip(arrays, specs)
        ]
        y = jax.jit(jax_trirun.matmul)(*there)
        text = jax.jit(jax_trirun.matmul).lower(*there).compile().as_text()
        assert "all-gather" not in text and text.count(" all-reduce(") == (name != "N"), (kind, name)
        for index, part in local(y):
            assert (np.abs(part - want.y[index]) <= want.bound[index]).all(), (kind, name)
        got = jax.jit(jax.grad(loss, (0, 1, 2)))(*(there[i] for i in (0, 2, 3, 1)))
        for g, w in zip(got, gradients):
            for index, part in local(g):
                np.testing.assert_allclose(part, w[index], rtol=1e-4, atol=1e-4 * np.abs(w).max())
print("all ways agree")
"""


def test_two_processes(tmp_path):
    with socket.socket() as probe:  # a port that is free now
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(port), str(number)],
            cwd=tmp_path,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        for host in hosts:
            out, err = host.communicate(timeout=240)
            assert host.returncode == 0, err[-5000:]
            assert "all ways agree" in out
    finally:
        for host in hosts:
            host.kill()
            host.wait()
