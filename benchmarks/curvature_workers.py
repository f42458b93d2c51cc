"""The worker processes of `curvature_cost.py`: keras_sharp on each backend, and the peers.

A worker is pinned to one core. It answers requests `(item, round)`: run this item, with the
number of the round as its seed, and say how much time it took and what came out.
"""

import gc
import importlib
import importlib.util
import os
import time
from typing import NamedTuple

import numpy as np
from workers import describe

EXAMPLES, PRODUCTS, STEPS = 512, 99, 40
STEM, WIDTHS, CLASSES = 16, (24, 48, 72), 10
#: Kernel size, stride, and numbers of channels before and after, of each convolution.
CONVOLUTIONS = [(3, 2, 3, STEM)]
for before, after in zip((STEM, *WIDTHS), WIDTHS, strict=False):
    CONVOLUTIONS += [(3, 2, before, after), (3, 1, after, after), (1, 2, before, after)]

QUICK = ("gradient", "product", "product_anew", "gauss_newton", "first_product", "top1", "top5")
LONG = ("trace", "hutch_plus_plus", "density")


class Worker(NamedTuple):
    """The package of a peer or `None`, and the backend."""

    peer: str | None
    backend: str


WORKERS = {
    "tensorflow": Worker(None, "tensorflow"),
    "jax": Worker(None, "jax"),
    "torch": Worker(None, "torch"),
    "pyhessian": Worker("pyhessian", "torch"),
    "hessian_eigenthings": Worker("hessian_eigenthings", "torch"),
    "curvlinops": Worker("curvlinops", "torch"),
    "bare_jax": Worker("jax", "jax"),
}


def serve(connection, name, problem, core):
    """The main function of a worker process, until the request `None`.

    It sends `("ready", items)` or `("missing", package)`, and answers a
    request with `("done", figures)`, a dictionary, or `("error", text)`.
    """
    try:
        if missing := prepare(name, core):
            connection.send(("missing", missing))
            return
        items = build(name, dict(np.load(problem)))
        connection.send(("ready", list(items)))
        while (request := connection.recv()) is not None:
            try:
                connection.send(("done", timed(items[request[0]], request[1])))
            except Exception as error:
                connection.send(("error", describe(error)))
    except EOFError:  # The driver is gone.
        return
    except Exception as error:
        connection.send(("error", describe(error)))


def prepare(name, core):
    """Pin this process, and import what it needs. The name of a missing package, or `None`."""
    os.sched_setaffinity(0, {core})  # Before any framework counts the cores.
    worker = WORKERS[name]
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu")
    os.environ["KERAS_BACKEND"] = worker.backend
    for package in (worker.backend, worker.peer or "keras_sharp"):
        if importlib.util.find_spec(package) is None:
            return package
        importlib.import_module(package)
    return None


def timed(item, seed):
    """CPU time of all threads of this process and wall time, beside what `item` returns."""
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    result = item(seed)
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        **(result if isinstance(result, dict) else {}),
    }


def build(name, problem):
    """The items of a worker: functions of a seed."""
    peer = WORKERS[name].peer
    return _ours(problem) if peer is None else _PEERS[peer](problem)


def errors(values, problem):
    """How far off eigenvalues are, the worst of them, relative to the true ones."""
    true = problem["eigenvalues"][: len(values)]
    return float(np.max(np.abs(np.sort(values)[::-1] / true - 1)))


# The problem: a network trained for a while


def make_problem(path, name, core):
    """Train the network and write data, weights and the largest eigenvalues to a file."""
    if missing := prepare(name, core):
        raise ImportError(missing)
    import keras
    from sklearn.datasets import load_digits

    from keras_sharp import curvature

    keras.utils.set_random_seed(0)
    digits = load_digits()
    images = np.kron(digits.images[:EXAMPLES] / 16, np.ones((1, 4, 4)))[..., None]
    x = np.repeat(images, 3, axis=-1).astype("float32")
    y = digits.target[:EXAMPLES].astype("int64")
    model = keras_network(keras)
    model.fit(x, y, batch_size=64, epochs=5, shuffle=False, verbose=0)
    operator = curvature.HessianOperator(model, x, y)
    true = curvature.eigenvalues(operator, k=6, tol=3e-5, max_products=200, verbose=0)
    arrays = {
        f"{layer.name}_{i}": value
        for layer in model.layers
        for i, value in enumerate(layer.get_weights())
    }
    np.savez(path, x=x, y=y, eigenvalues=true.values, **arrays)


def keras_network(keras):
    """The network for Keras, compiled; padded as PyTorch does it."""
    layers = keras.layers

    def conv(i, x):
        size, stride, _, width = CONVOLUTIONS[i]
        x = layers.ZeroPadding2D(size // 2)(x)
        x = layers.Conv2D(width, size, stride, use_bias=False, name=f"conv{i}")(x)
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"norm{i}")(x)

    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(conv(0, inputs))
    for i in range(1, len(CONVOLUTIONS), 3):
        y = layers.ReLU()(conv(i, x))
        x = layers.ReLU()(layers.Add()([conv(i + 1, y), conv(i + 2, x)]))
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, layers.Dense(CLASSES, name="head")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss)
    return model


def torch_network(problem):
    """The network for bare PyTorch, in evaluation mode, with the weights of the problem."""
    import torch
    from torch import nn

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(
                nn.Conv2d(before, after, size, stride, size // 2, bias=False)
                for size, stride, before, after in CONVOLUTIONS
            )
            self.norms = nn.ModuleList(nn.BatchNorm2d(after) for *_, after in CONVOLUTIONS)
            self.head = nn.Linear(WIDTHS[-1], CLASSES)

        def conv(self, i, x):
            return self.norms[i](self.convs[i](x))

        def forward(self, x):
            x = torch.relu(self.conv(0, x))
            for i in range(1, len(CONVOLUTIONS), 3):
                y = torch.relu(self.conv(i, x))
                x = torch.relu(self.conv(i + 1, y) + self.conv(i + 2, x))
            return self.head(x.mean((2, 3)))

    network = Network().eval()
    with torch.no_grad():
        for i in range(len(CONVOLUTIONS)):
            network.convs[i].weight.copy_(torch.tensor(problem[f"conv{i}_0"].transpose(3, 2, 0, 1)))
            norm = network.norms[i]
            parts = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            for k, part in enumerate(parts):
                part.copy_(torch.tensor(problem[f"norm{i}_{k}"]))
        network.head.weight.copy_(torch.tensor(problem["head_0"].T))
        network.head.bias.copy_(torch.tensor(problem["head_1"]))
    x = torch.tensor(problem["x"].transpose(0, 3, 1, 2).copy())
    return network, x, torch.tensor(problem["y"]), nn.CrossEntropyLoss()


def jax_loss(problem):
    """The loss of bare JAX, in evaluation mode, of the weights of the problem; and these."""
    import jax
    import jax.numpy as jnp

    x, y = jnp.asarray(problem["x"]), jnp.asarray(problem["y"])
    layout = ("NHWC", "HWIO", "NHWC")

    def conv(weights, i, x):
        size, stride, *_ = CONVOLUTIONS[i]
        kernel, scale, offset = weights[f"conv{i}_0"], weights[f"norm{i}_0"], weights[f"norm{i}_1"]
        mean, variance = problem[f"norm{i}_2"], problem[f"norm{i}_3"]
        padding = [(size // 2, size // 2)] * 2
        x = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=layout
        )
        scale = scale * jax.lax.rsqrt(variance + 1e-5)
        return x * scale + (offset - mean * scale)

    def loss(weights):
        z = jax.nn.relu(conv(weights, 0, x))
        for i in range(1, len(CONVOLUTIONS), 3):
            inner = jax.nn.relu(conv(weights, i, z))
            z = jax.nn.relu(conv(weights, i + 1, inner) + conv(weights, i + 2, z))
        logits = z.mean((1, 2)) @ weights["head_0"] + weights["head_1"]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)
        return -jnp.mean(chosen)

    moments = {f"norm{i}_{part}" for i in range(len(CONVOLUTIONS)) for part in (2, 3)}
    others = {"x", "y", "eigenvalues"} | moments
    return loss, {key: jnp.asarray(problem[key]) for key in problem.keys() - others}


# keras_sharp


def _ours(problem):
    import keras

    from keras_sharp import curvature, engine
    from keras_sharp.surface import LossSurface

    model, x, y = keras_network(keras), problem["x"], problem["y"]
    for layer in model.layers:
        layer.set_weights([problem[f"{layer.name}_{i}"] for i in range(len(layer.get_weights()))])
    # The bare gradient, without what LossSurface does around it, as that of the peers.
    surface = LossSurface(model, x, y, batch_size=EXAMPLES)
    w, state, (batch,) = surface.weights, surface.state, surface.batches()
    value_and_gradient = engine.compiled(
        lambda w, state, batch: engine.value_and_gradient(
            lambda v: surface.batch_loss(v, state, batch), w
        )
    )
    hessian = curvature.HessianOperator(model, x, y)
    anew = curvature.HessianOperator(model, x, y, batch_size=EXAMPLES // 2)
    gauss_newton = curvature.GaussNewtonOperator(model, x, y)
    v = np.random.default_rng(0).standard_normal(hessian.size).astype("float32")

    def gradient(seed):
        (loss, _), _ = value_and_gradient(w, state, batch)
        keras.ops.convert_to_numpy(loss)  # Waits for it.

    def first_product(seed):
        hessian.refresh()
        return hessian.matvec(v)

    def top(k):
        def run(seed):
            found = curvature.eigenvalues(hessian, k=k, seed=seed, verbose=0)
            return {"products": found.products, "error": errors(found.values, problem)}

        return run

    def estimate(function):
        def run(seed):
            found = function(hessian, num_products=PRODUCTS, seed=seed, verbose=0)
            return {"products": found.products, "value": found.value}

        return run

    def density(seed):
        found = curvature.spectral_density(hessian, steps=STEPS, seed=seed, verbose=0)
        return {"products": found.products}

    return {
        "gradient": gradient,
        "product": lambda seed: hessian.matvec(v),
        "product_anew": lambda seed: anew.matvec(v) is None,
        "gauss_newton": lambda seed: gauss_newton.matvec(v) is None,
        "first_product": first_product,
        "top1": top(1),
        "top5": top(5),
        "trace": estimate(curvature.trace),
        "hutch_plus_plus": estimate(curvature.hutch_plus_plus),
        "density": density,
    }


# The peers, all of them for PyTorch. Each of their calls sets up its operator anew.


def _torch_gradient(network, x, y, loss):
    import torch

    def gradient(seed):
        torch.autograd.grad(loss(network(x), y), list(network.parameters()))

    return gradient


def _pyhessian(problem):
    import torch

    network, x, y, loss = torch_network(problem)
    module = importlib.import_module("pyhessian.hessian")
    product, count = module.hessian_vector_product, [0]

    def counting(*args):
        count[0] += 1
        return product(*args)

    module.hessian_vector_product = counting

    def hessian(seed):
        torch.manual_seed(seed)
        count[0] = 0
        network.zero_grad(set_to_none=True)  # It accumulates into the gradients that it finds.
        return module.hessian(network, loss, data=(x, y), cuda=False)

    def top(k, tol):
        def run(seed):
            values, _ = hessian(seed).eigenvalues(top_n=k, tol=tol)
            return {"products": count[0], "error": errors(values, problem)}

        return run

    def trace(seed):
        samples = hessian(seed).trace(maxIter=PRODUCTS, tol=0.0)
        return {"products": count[0], "value": float(np.mean(samples))}

    def density(seed):
        hessian(seed).density(iter=STEPS)
        return {"products": count[0]}

    operator = hessian(0)
    v = [torch.randn_like(p) for p in operator.params]
    return {
        "gradient": _torch_gradient(network, x, y, loss),
        "product": lambda seed: product(operator.gradsH, operator.params, v),
        "top1": top(1, 1e-3),
        "top5": top(5, 1e-4),  # With its default of 1e-3 it misses a thousandth.
        "trace": trace,
        "density": density,
    }


def _hessian_eigenthings(problem):
    import hessian_eigenthings as peer
    import torch

    network, x, y, loss = torch_network(problem)

    class Counting(peer.HessianOperator):
        products = 0

        def matvec(self, v):
            self.products += 1
            return super().matvec(v)

    def operator():
        return Counting(network, [(x, y)], lambda model, batch: loss(model(batch[0]), batch[1]))

    def top(k, steps):
        def run(seed):
            hessian = operator()
            found = peer.lanczos(hessian, k=k, max_iter=steps, which="LA", seed=seed)
            values = found.eigenvalues.detach().numpy()
            return {"products": hessian.products, "error": errors(values, problem)}

        return run

    def trace(function, **kwargs):
        def run(seed):
            hessian = operator()
            found = function(hessian, seed=seed, **kwargs)
            return {"products": hessian.products, "value": float(found.estimate)}

        return run

    def density(seed):
        hessian = operator()
        peer.spectral_density(hessian, num_runs=1, lanczos_steps=STEPS, seed=seed)
        return {"products": hessian.products}

    hessian = operator()
    v = torch.randn(hessian.size)
    return {
        "gradient": _torch_gradient(network, x, y, loss),
        "product": lambda seed: hessian.matvec(v),
        "top1": top(1, 8),  # It does not stop by itself: it is told what suffices.
        "top5": top(5, 20),
        "trace": trace(peer.hutchinson, num_samples=PRODUCTS),
        "hutch_plus_plus": trace(peer.hutch_plus_plus, num_matvecs=PRODUCTS),
        "density": density,
    }


def _curvlinops(problem):
    import curvlinops as peer
    import torch
    from scipy.sparse import linalg

    network, x, y, loss = torch_network(problem)
    parameters = list(network.parameters())

    def operator():
        return peer.HessianLinearOperator(network, loss, parameters, [(x, y)])

    def top(k, tol):
        def run(seed):
            product, count = operator().to_scipy(), [0]

            def counting(v):
                count[0] += 1
                return product @ v

            wrapped = linalg.LinearOperator(product.shape, counting, dtype=product.dtype)
            start = np.random.default_rng(seed).standard_normal(product.shape[0])
            values = linalg.eigsh(
                wrapped, k, which="LA", tol=tol, v0=start, return_eigenvectors=False
            )
            return {"products": count[0], "error": errors(values, problem)}

        return run

    def trace(function):
        def run(seed):
            torch.manual_seed(seed)
            return {"products": PRODUCTS, "value": float(function(operator(), PRODUCTS))}

        return run

    hessian = operator()
    v = torch.randn(hessian.shape[1])
    return {
        "gradient": _torch_gradient(network, x, y, loss),
        "product": lambda seed: hessian @ v,
        "top1": top(1, 1e-2),
        "top5": top(5, 1e-1),
        "trace": trace(peer.hutchinson_trace),
        "hutch_plus_plus": trace(peer.hutchpp_trace),
    }


def _bare_jax(problem):
    """What JAX takes by itself for what keras_sharp asks of it: the floor of its product."""
    import jax

    loss, weights = jax_loss(problem)
    gradient = jax.jit(jax.grad(loss))
    # The jitted function returns the product as a pytree of what the pass has kept.
    keep = jax.jit(lambda weights: jax.linearize(jax.grad(loss), weights)[1])
    product, anew = jax.jit(lambda kept, v: kept(v)), jax.jit(lambda w, v: keep(w)(v))
    kept, v = keep(weights), jax.tree.map(jax.numpy.ones_like, weights)

    def run(function, *args):
        return lambda seed: jax.block_until_ready(function(*args)) is None

    return {
        "gradient": run(gradient, weights),
        "product": run(product, kept, v),
        "product_anew": run(anew, weights, v),
    }


_PEERS = {
    "jax": _bare_jax,
    "pyhessian": _pyhessian,
    "hessian_eigenthings": _hessian_eigenthings,
    "curvlinops": _curvlinops,
}
