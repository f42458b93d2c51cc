"""Sharpness-aware directions for a training loop of one's own."""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_sharp import engine, methods
from keras_sharp.identifiers import did_you_mean
from keras_sharp.objective import Objective
from keras_sharp.schedules import ProportionalToLearningRate, WarmUp, full_precision
from keras_sharp.weights import is_bias


class SharpnessAwareGradient(NamedTuple):
    """What `sharpness_aware_gradient` returns.

    Attributes:
        loss: scalar tensor, the loss at the weights, not at perturbed ones.
        direction: what the optimizer receives in place of the gradient, in the
            structure of the weights.
        memory: list of tensors, what the method remembers for the next step.
        aux: what the loss function returned beside the loss at the weights.
        finite: scalar Boolean tensor, whether the direction, and each loss and
            gradient on the way to it, is finite.
    """

    loss: Any
    direction: Any
    memory: list
    aux: Any
    finite: Any


def sharpness_aware_gradient(
    loss_fn,
    weights,
    method,
    memory=None,
    *,
    step=None,
    learning_rate=None,
    has_aux=False,
    perturbed=None,
    biases=None,
    **hyperparameters,
):
    """The direction of a sharpness-aware method, for a training loop of your own.

    It takes the place of the gradient in a loop that is written by hand, where
    `SharpnessAwareModel` cannot be used: a GAN, or any other model with a
    `train_step` of its own. The optimizer is yours: nothing is written, to no
    variable. Inside a `tf.function` or a `jax.jit` it is compiled along.

    `loss_fn` is called once for each gradient that the method takes, at the
    weights and at perturbed ones, and must be a pure function of them. Of a
    Keras model use `stateless_call`: it takes the weights as an argument, and
    returns the new statistics of BatchNormalization, which it does not write.
    Handed the same `non_trainable_variables`, all calls draw the same dropout
    masks; on PyTorch, only those of layers that were made with a `seed`.

    Unlike the wrapper this skips no step. Where `finite` is `False`, leave the
    weights, the optimizer and the memory as they were.

    Args:
        loss_fn: function of the weights, tensors in the structure of
            `weights`, that returns the loss, a scalar tensor; with `has_aux`
            the pair `(loss, aux)`.
        weights: the weights to train, float tensors in a list, a dictionary or
            any other structure that `keras.tree` knows. On TensorFlow and
            PyTorch they may be Keras variables, `model.trainable_variables`
            say; `loss_fn` receives their values.
        method: a `keras_sharp.methods.Method`, or the name of one. Inside a
            `tf.function` use a `Method` that was made outside of it, since it
            holds variables.
        memory: the `memory` that the step before returned. Defaults to `None`,
            the first step. To begin with the structure that all steps share,
            pass `method.initial_state(model.trainable_variables)`.
        step: Integer or scalar integer tensor, the number of steps that the
            optimizer has done so far. Needed if a hyperparameter is a schedule
            of the step, or if the method goes by the step, as LookSAM and some
            policies do. Defaults to `None`.
        learning_rate: Float or scalar tensor, for a hyperparameter that
            follows the learning rate; its `ProportionalToLearningRate` must
            then say `max_learning_rate`, as nothing here remembers the highest
            one so far. Defaults to `None`, a learning rate that is constant.
        has_aux: Boolean. Whether `loss_fn` returns something beside the loss.
            Defaults to `False`.
        perturbed: Booleans in the structure of `weights`: `True` if a weight
            takes part in the perturbation. Defaults to `None`, all of them.
        biases: Booleans in the structure of `weights`: `True` for a bias,
            which ASAM does not scale. Defaults to `None`: Keras variables are
            told by their names as in the wrapper; of tensors, none is a bias.
        **hyperparameters: numbers or scalar tensors, such as `rho`, to use in
            place of those of the method. In a function compiled by JAX, pass
            what is to change from step to step in this way: the method's own
            numbers are compiled in.

    Returns:
        A named tuple. `loss` is the loss at the weights; `direction` takes the
        place of the gradient, and has the structure of `weights`, with `None`
        for a weight that the loss does not depend on (0 on JAX); `memory` is
        for the next step; `aux` is what `loss_fn` returned beside the loss at
        the weights, or `None`; `finite`, a scalar Boolean tensor, tells
        whether all of this can be used.

    Raises:
        ValueError: if an argument is not one of these, if `loss_fn` returns no
            scalar, or one that does not depend on the weights it was given.
        TypeError: if the method has no hyperparameter of that name.

    Example:

    >>> x, y = ops.ones((8, 4)), ops.ones((8, 1))
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> optimizer = keras.optimizers.SGD(0.1)
    >>> method = keras_sharp.methods.SAM(rho=0.05)
    >>> def loss_fn(w):
    ...     y_pred, _ = model.stateless_call(w, [], x, training=True)
    ...     return ops.mean((y_pred - y) ** 2)
    >>> w = [v.value for v in model.trainable_variables]
    >>> result = keras_sharp.sharpness_aware_gradient(loss_fn, w, method)
    >>> [d.shape == v.shape for d, v in zip(result.direction, w)]
    [True, True]
    >>> optimizer.apply(result.direction, model.trainable_variables)

    Reference:
        - [Foret et al., 2021](https://arxiv.org/abs/2010.01412)
    """
    method = methods.get(method)
    given = keras.tree.flatten(weights)
    _check_weights(weights, given)
    if biases is None:
        marks = [isinstance(t, keras.Variable) and is_bias(t) for t in given]
    else:
        marks = _flags("biases", biases, given)
    if method.draws_random_numbers:
        raise ValueError(
            f"The method {type(method).__name__} draws random numbers, and nothing here keeps a "
            "seed. Train with `SharpnessAwareModel`, or use another method."
        )
    if method.by_passes_optimizer:
        raise ValueError(
            f"A part of the step of the method {type(method).__name__} by-passes the optimizer, "
            "and is no part of the direction. Train with `SharpnessAwareModel`, or use the coupled "
            "form, `decoupled=False`."
        )
    objective = Objective.with_aux(
        _value_fn(loss_fn, weights, has_aux),
        perturbed=None if perturbed is None else _flags("perturbed", perturbed, given),
        biases=marks,
        step=None if step is None else _value("step", step),
    )
    values = _hyperparameters(method, step, learning_rate, hyperparameters)
    memory = _memory(method, memory, given)

    w = [_value("weights", t) for t in given]
    direction, memory = method.step(objective, w, memory, **values)
    if all(t is None for t in direction):
        raise ValueError(_INDEPENDENT)
    report = objective.record.report
    return SharpnessAwareGradient(
        report.loss,
        keras.tree.pack_sequence_as(weights, list(direction)),
        list(memory),
        report.aux,
        objective.is_finite(direction),
    )


_INDEPENDENT = (
    "The loss must depend on the weights that `loss_fn` is given. Received: a loss that depends on "
    "none of them. Compute with the argument of `loss_fn`, by `model.stateless_call(w, ...)` say: "
    "`model(x)` reads the variables of the model in their place."
)


def _value_fn(loss_fn, weights, has_aux):
    """`loss_fn` as a function of the flat list of weights that returns `(loss, aux)`."""

    def value_fn(w, batch):
        del batch  # `loss_fn` has it.
        value = loss_fn(keras.tree.pack_sequence_as(weights, w))
        is_pair = isinstance(value, (tuple, list)) and len(value) == 2
        if is_pair != has_aux:
            raise ValueError(
                "`loss_fn` must return the loss, a scalar tensor, and with `has_aux=True` the pair "
                f"`(loss, aux)`. Received: has_aux={has_aux!r}, and a `loss_fn` that returned "
                f"{value!r}."
            )
        loss, aux = value if has_aux else (value, None)
        if not ops.is_tensor(loss) or loss.shape != ():
            received = f"the shape {tuple(loss.shape)}" if ops.is_tensor(loss) else f"{loss!r}"
            raise ValueError(
                "The loss that `loss_fn` returns must be a scalar tensor, of shape (). Received: "
                f"{received}. Take the mean over the batch, by `keras.ops.mean` say."
            )
        return loss, aux

    return value_fn


def _check_weights(weights, given):
    if not given:
        raise ValueError(
            f"`weights` must hold at least one weight. Received: weights={weights!r}. A model has "
            "weights once it is built."
        )
    for t in given:
        is_float = (ops.is_tensor(t) or isinstance(t, keras.Variable)) and (
            keras.backend.is_float_dtype(keras.backend.standardize_dtype(t.dtype))
        )
        if not is_float:
            raise ValueError(
                "`weights` must be float tensors, or Keras variables, in a list, a dictionary or "
                f"another structure that `keras.tree` knows. Received an entry {t!r} (of type "
                f"{type(t).__name__}). Leave out what is not trained; "
                "`keras.ops.convert_to_tensor` makes tensors of arrays."
            )


def _value(name, t):
    """A tensor through which no gradient flows, from a tensor, a variable or a number."""
    if isinstance(t, keras.Variable):
        # Compiled, JAX would take today's value for a constant, and go on with that in silence.
        if keras.backend.backend() == "jax":
            raise ValueError(
                f"On JAX `{name}` must be tensors. Received: the Keras variable {t.path!r}. Hand "
                "the value, `variable.value`, to your training step as an argument."
            )
        return engine.read(t)
    return ops.stop_gradient(ops.convert_to_tensor(t))


def _flags(name, flags, given):
    flat = keras.tree.flatten(flags)
    if len(flat) != len(given) or not all(isinstance(f, bool) for f in flat):
        raise ValueError(
            f"`{name}` must hold one Boolean for each of the {len(given)} weights. Received: "
            f"{name}={flags!r}"
        )
    return flat


def _memory(method, memory, given):
    if memory is None:
        dtypes = [keras.backend.standardize_dtype(t.dtype) for t in given]
        # Shapes and dtypes as Keras variables tell them.
        shapes = [keras.KerasTensor(t.shape, d) for t, d in zip(given, dtypes, strict=True)]
        memory = method.initial_state(shapes)
    elif not isinstance(memory, (list, tuple)):
        raise ValueError(
            "`memory` must be the list that the step before returned, or None for the first step. "
            f"Received: memory={memory!r}"
        )
    return [ops.convert_to_tensor(m) for m in memory]


def _hyperparameters(method, step, learning_rate, given):
    """The hyperparameters of this step, scalar tensors by name."""
    for name in given:
        if name not in method.settings:
            known = list(method.settings)
            raise TypeError(
                f"The method {type(method).__name__} has no hyperparameter `{name}`."
                f"{did_you_mean(name, known)} Expected one of {known}. Received: "
                f"{name}={given[name]!r}"
            )
    if step is not None:
        step = _value("step", step)
    values: dict[str, Any] = {}

    def read(variable):  # One may follow another, which comes first.
        of_step = (v for name, v in values.items() if method.settings[name].variable is variable)
        return next(of_step, engine.read(variable))

    for name, setting in method.settings.items():
        if name in given:
            values[name] = _number(setting, given[name])
            continue
        schedule = setting.schedule
        if schedule is not None and step is None and not _follows_rate(schedule):
            raise ValueError(
                f"`{name}` of the method {type(method).__name__} is a schedule of the step. "
                "Received: step=None. Pass the number of steps so far: "
                "`step=optimizer.iterations`, say."
            )
        if isinstance(schedule, WarmUp):
            schedule = schedule.setting.schedule
        if _follows_rate(schedule) and (schedule.max_learning_rate is None) != (
            learning_rate is None
        ):
            raise ValueError(
                f"`{name}` of the method {type(method).__name__} follows the learning rate. To "
                "follow one that changes, it needs both the learning rate and its maximum: "
                f"`{name}=ProportionalToLearningRate(..., max_learning_rate=...)`, and "
                f"`learning_rate`. Received: max_learning_rate={schedule.max_learning_rate!r}, "
                f"learning_rate={learning_rate!r}"
            )
        rate = 1.0 if learning_rate is None else _value("learning_rate", learning_rate)
        rate = ops.cast(rate, full_precision())
        values[name] = setting.value_at(step, lambda rate=rate: (rate, rate), read)
    return values


def _follows_rate(schedule):
    return isinstance(schedule, ProportionalToLearningRate)


def _number(setting, value):
    """A hyperparameter that was given for this step, as a scalar tensor."""
    if ops.is_tensor(value) or isinstance(value, keras.Variable):
        value = _value(setting.name, value)
        if value.shape != ():
            raise ValueError(
                f"`{setting.name}` must be a number or a scalar tensor. Received a tensor of the "
                f"shape {tuple(value.shape)}."
            )
    elif callable(value):
        raise ValueError(
            f"`{setting.name}` of one step is a number or a scalar tensor. Received: "
            f"{setting.name}={value!r}. Give a schedule to the method, and `step` here."
        )
    else:
        value = setting._check(value)
    return ops.cast(value, full_precision())
