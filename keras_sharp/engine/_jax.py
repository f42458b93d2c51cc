"""The JAX engine: `jax.value_and_grad`, and the step as a pure function of state."""

import jax
import jax.numpy as jnp
import keras


def value_and_gradient(fn, weights):
    """`(value, aux), gradient` of `fn(weights) -> (value, aux)`."""
    return jax.value_and_grad(fn, has_aux=True)(weights)


def cond(condition, if_true, if_false):
    """The value of one of two functions without arguments."""
    return jax.lax.cond(condition, if_true, if_false)


def run_either(condition, if_true, if_false, variables):
    """Run one of two functions that assign to some of `variables`."""
    old = [v.value for v in variables]

    def branch(fn):
        def run():
            with keras.StatelessScope(state_mapping=zip(variables, old, strict=True)) as scope:
                fn()
            return [scope.get_current_value(v) for v in variables]

        return run

    new = jax.lax.cond(condition, branch(if_true), branch(if_false))
    for variable, value in zip(variables, new, strict=True):
        variable.assign(value)


def apply(optimizer, gradients, variables):
    """One step of the optimizer."""
    new_values, new_slots = optimizer.stateless_apply(
        [v.value for v in optimizer.variables], gradients, [v.value for v in variables]
    )
    for variable, value in zip(
        [*variables, *optimizer.variables], [*new_values, *new_slots], strict=True
    ):
        variable.assign(value)


def average_micro_batches(fn, threaded, batch, num_micro_batches):
    """Run `fn` on equal parts of a batch, one after the other.

    Args:
        fn: `fn(threaded, micro_batch) -> (threaded, averaged, outputs)`.
        threaded: what the first part receives, and each hands to the next.
        batch: nested structure of tensors with a common first axis.
        num_micro_batches: Integer, the number of parts. Their sizes differ
            by one example at most.

    Returns:
        The last `threaded`; the mean of `averaged` over the parts, weighted
        by their sizes; and the `outputs`, concatenated.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    quotient, remainder = divmod(size, num_micro_batches)
    total, outputs = None, []
    # `remainder` parts have one example more than the others: one loop for
    # each of the two sizes. A loop, not `vmap`: each part has weights of its
    # own in its second pass, which turns convolutions into grouped ones.
    for start, parts, length in [
        (0, remainder, quotient + 1),
        (remainder * (quotient + 1), num_micro_batches - remainder, quotient),
    ]:
        if parts == 0 or length == 0:
            continue
        stacked = jax.tree.map(
            lambda t, a=start, p=parts, n=length: t[a : a + p * n].reshape((p, n, *t.shape[1:])),
            batch,
        )
        if total is None:
            one = jax.tree.map(lambda t: t[0], stacked)
            shapes = jax.eval_shape(fn, threaded, one)[1]
            total = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), shapes)

        def body(carry, part, weight=length / size):
            threaded, total = carry
            threaded, averaged, output = fn(threaded, part)
            total = jax.tree.map(lambda a, b: a + b * jnp.asarray(weight, b.dtype), total, averaged)
            return (threaded, total), output

        (threaded, total), output = jax.lax.scan(body, (threaded, total), stacked)
        outputs.append(jax.tree.map(lambda t: t.reshape((-1, *t.shape[2:])), output))
    outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
    return threaded, total, outputs


def dot(xs, ys):
    """The inner product of two lists of tensors, in float32 or float64."""
    return sum(_dot(x, y) for x, y in zip(xs, ys, strict=True))


def _dot(x, y):
    if x.dtype not in (jnp.float32, jnp.float64):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.sum(x * y)


def scale(a, xs):
    """`a * x` for each tensor of a list."""
    return [(a if isinstance(a, float) else a.astype(x.dtype)) * x for x in xs]


def add(xs, ys):
    """`x + y` for each pair of two lists, in the dtype of `x`."""
    return [x + y.astype(x.dtype) for x, y in zip(xs, ys, strict=True)]


def add_scaled(ys, a, xs):
    """`y + a * x` for each pair of two lists, in the dtype of `y`."""
    return add(ys, scale(a, xs))


def quotient(a, b):
    """`a / b` for scalars, and 0 with derivative 0 where `b` is 0."""
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))


def compiled(fn):
    """A pure function of tensors, compiled."""
    return jax.jit(fn)


def global_seeds():
    """Variables outside the model that its random numbers may come from: none."""
    return []  # Keras refuses unseeded random numbers in a traced function.


def random_state():
    """The state of random numbers that are in no variable: JAX has none."""


def set_random_state(state):
    """Go back to a state of `random_state`."""


def check_layers(model):
    """Refuse a model with layers that a pure function of the weights cannot reach."""
    del model  # Every trainable Keras layer works.


class Trainer:
    """The glue into `JAXTrainer`: state in, state out."""

    def compute_loss_and_updates(
        self,
        trainable_variables,
        non_trainable_variables,
        metrics_variables,
        x,
        y,
        sample_weight,
        training=False,
        optimizer_variables=None,
    ):
        # Keras runs the forward pass and the loss in two scopes, and carries
        # the losses of the layers (`add_loss`, activity regularizers) from
        # the one to the other on the model itself. The wrapped model, which
        # computes the loss here, would not see them; one scope does.
        del optimizer_variables  # Only training scales the loss; it does not come here.
        groups = (
            (self.trainable_variables, trainable_variables),
            (self.non_trainable_variables, non_trainable_variables),
            (self.metrics_variables, metrics_variables),
        )
        mapping = [pair for group in groups for pair in zip(*group, strict=True)]
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            y_pred = self.model(x, training=training)
            loss = self.compute_loss(
                x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
            )
        _, non_trainable, metrics = (
            [scope.get_current_value(v) for v in variables] for variables, _ in groups
        )
        return loss, (loss, y_pred, non_trainable, metrics)

    def train_step(self, state, data):
        groups = (
            self.trainable_variables,
            self.non_trainable_variables,
            self.optimizer.variables,
            self.metrics_variables,
        )
        mapping = [
            pair for group in zip(groups, state, strict=True) for pair in zip(*group, strict=True)
        ]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            logs = self.sharpness_aware_step(data)
        return logs, tuple([scope.get_current_value(v) for v in group] for group in groups)
