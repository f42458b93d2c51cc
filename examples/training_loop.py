"""A training loop of your own, on each backend, in which SAM takes one line.

    python examples/training_loop.py
    python examples/training_loop.py --backend torch --seed 1

There is no `fit` here and no wrapper: the loops are those that the users of TensorFlow, JAX
and PyTorch write by hand. `keras_sharp.sharpness_aware_gradient` takes the place of the
gradient. Only one of the three functions below runs, the one of the backend that is chosen.
The picture shows the loss in training and the accuracy, without an adversary and with one.
"""

import datasets
from common import parse, save

args = parse(__doc__, epochs=30, quick_epochs=2)

import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_sharp  # noqa: E402

cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def tensorflow_loop(model, method, batches):
    """Keras variables and a Keras optimizer in a `tf.function`."""
    import tensorflow as tf

    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    optimizer.build(model.trainable_variables)

    @tf.function(reduce_retracing=True)
    def train_step(x, y):
        state = [tf.convert_to_tensor(v) for v in model.non_trainable_variables]

        def loss_fn(w):
            logits, new_state = model.stateless_call(w, state, x, training=True)
            return cross_entropy(y, logits), new_state

        result = keras_sharp.sharpness_aware_gradient(
            loss_fn, model.trainable_variables, method, has_aux=True
        )
        optimizer.apply(result.direction, model.trainable_variables)
        for variable, value in zip(model.non_trainable_variables, result.aux, strict=True):
            variable.assign(value)
        return result.loss

    for epoch in batches():
        yield [float(train_step(tf.constant(x), tf.constant(y))) for x, y in epoch]


def jax_loop(model, method, batches):
    """Values in and values out of a pure function in `jax.jit`."""
    import jax

    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    optimizer.build(model.trainable_variables)
    biases = [v.name in ("bias", "beta") for v in model.trainable_variables]

    @jax.jit
    def train_step(w, state, slots, x, y):
        def loss_fn(w):
            logits, new_state = model.stateless_call(w, state, x, training=True)
            return cross_entropy(y, logits), new_state

        result = keras_sharp.sharpness_aware_gradient(
            loss_fn, w, method, has_aux=True, biases=biases
        )
        w, slots = optimizer.stateless_apply(slots, result.direction, w)
        return w, result.aux, slots, result.loss

    slots = [v.value for v in optimizer.variables]
    for epoch in batches():
        w = [v.value for v in model.trainable_variables]
        state = [v.value for v in model.non_trainable_variables]
        losses = []
        for x, y in epoch:
            w, state, slots, loss = train_step(w, state, slots, x, y)
            losses.append(loss)
        # The model is told once per epoch, so that it can be evaluated.
        variables = model.trainable_variables + model.non_trainable_variables
        for variable, value in zip(variables, w + state, strict=True):
            variable.assign(value)
        yield [float(loss) for loss in losses]


def torch_loop(model, method, batches):
    """An optimizer of PyTorch, which takes the direction where the gradient would be."""
    import torch

    parameters = [v.value for v in model.trainable_variables]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    device = parameters[0].device
    for epoch in batches():
        losses = []
        for x, y in epoch:
            x, y = torch.as_tensor(x, device=device), torch.as_tensor(y, device=device)
            state = [v.value.clone() for v in model.non_trainable_variables]

            def loss_fn(w, x=x, y=y, state=state):
                logits, new_state = model.stateless_call(w, state, x, training=True)
                return cross_entropy(y, logits), new_state

            result = keras_sharp.sharpness_aware_gradient(
                loss_fn, model.trainable_variables, method, has_aux=True
            )
            for parameter, direction in zip(parameters, result.direction, strict=True):
                parameter.grad = direction
            optimizer.step()
            for variable, value in zip(model.non_trainable_variables, result.aux, strict=True):
                variable.assign(value)
            losses.append(float(result.loss))
        yield losses


def main():
    import matplotlib.pyplot as plt

    backend = keras.backend.backend()
    print(f"Backend: {backend}, Keras {keras.__version__}")
    (x, y), test_data = datasets.load_images("digits", num_train=600)
    loop = {"tensorflow": tensorflow_loop, "jax": jax_loop, "torch": torch_loop}[backend]
    methods = {
        "no adversary": None,
        "SAM": keras_sharp.methods.SAM(rho=0.1),
        "GSAM": keras_sharp.methods.GSAM(rho=0.1),
    }

    def batches():
        order = np.random.default_rng(args.seed)
        for _ in range(args.epochs):
            shuffled = order.permutation(len(x))[: len(x) // 50 * 50].reshape(-1, 50)
            yield [(x[i], y[i]) for i in shuffled]

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, method in methods.items():
        keras.utils.set_random_seed(args.seed)
        model = keras.Sequential(
            [
                keras.Input(x.shape[1:]),
                keras.layers.Flatten(),
                keras.layers.Dense(64),
                keras.layers.BatchNormalization(),
                keras.layers.Activation("relu"),
                keras.layers.Dense(10),
            ]
        )
        model.compile(loss=cross_entropy, metrics=["accuracy"])  # For `evaluate`.
        losses, accuracies = [], []
        for losses_of_epoch in loop(model, keras_sharp.methods.get(method), batches):
            losses.append(np.mean(losses_of_epoch))
            accuracies.append(model.evaluate(*test_data, batch_size=500, verbose=0)[1])
        print(f"{name:>12}: loss {losses[-1]:.4f}, test accuracy {accuracies[-1]:.3f}", flush=True)
        left.semilogy(range(1, args.epochs + 1), losses, label=name)
        right.plot(range(1, args.epochs + 1), accuracies, label=name)
    left.set(xlabel="epoch", ylabel="loss in training")
    right.set(xlabel="epoch", ylabel="test accuracy")
    right.legend()
    save(figure, args.output)


if __name__ == "__main__":
    main()
