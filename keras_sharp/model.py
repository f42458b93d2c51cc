"""`SharpnessAwareModel`: the wrapper that trains a Keras model with a method."""

import inspect
import warnings

import keras
import numpy as np
from keras import ops

from keras_sharp import cold_start, engine, methods, rounding, saving, vectors
from keras_sharp.delegation import Delegation, warn_of_plain_training
from keras_sharp.identifiers import did_you_mean, meant
from keras_sharp.objective import Objective, State, TrainingLoss, compute_loss
from keras_sharp.preprocessing import (
    only_preprocesses,
    preprocess_batch,
    preprocess_data,
    preprocess_fit,
)
from keras_sharp.schedules import full_precision
from keras_sharp.weights import get_choice, is_bias, is_overwritten

#: The choices of `perturbation_scope`.
SCOPES = ("global", "replica")

#: Logs that are computed only if asked for, by `extra_logs`.
EXTRA_LOGS = ("perturbed_loss", "sharpness", "grad_norm", "grad_cosine", "skipped_steps")

#: The arguments of the constructor that make the training step what it is.
_FIXED = (
    "model",
    "num_micro_batches",
    "perturbation_scope",
    "perturb",
    "fresh_noise",
    "extra_logs",
)

#: Those arguments of `compile` that are not about optimizer, loss and metrics.
_HOW_TO_RUN = ("run_eagerly", "steps_per_execution", "jit_compile", "auto_scale_loss")

_OVERRIDDEN = (
    "The wrapped model has a `{name}` of its own, which SharpnessAwareModel would bypass. "
    "Received: a model of the class {cls}. Expected a model that leaves `{name}` to keras.Model. "
    "{advice}"
)
_ADVICE = {
    "train_step": (
        "A custom loss belongs in `compute_loss` and custom metrics in `compute_metrics`: both are "
        "kept. A model whose step is more than loss and gradient (a GAN, say) cannot be wrapped."
    ),
    "test_step": "Custom evaluation belongs in `compute_loss` and `compute_metrics`, both kept.",
    "predict_step": "Let `call` return what `predict` is to return.",
    "fit": "Do what it adds, such as preprocessing, to the data before `fit`.",
    "evaluate": "Do what it adds, such as preprocessing, to the data before `evaluate`.",
    "predict": "Do what it adds, such as preprocessing, to the data before `predict`.",
}


@keras.saving.register_keras_serializable(package="keras_sharp")
class SharpnessAwareModel(engine.Trainer, Delegation, keras.Model):
    """Trains a Keras model with SAM, ASAM, GSAM, Adaptive-GSAM or BSAM.

    Wrap the model you have, then call `compile` and `fit` as always:

    ```python
    model = keras_sharp.SharpnessAwareModel(my_model, method="sam")
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, epochs=10)
    my_model.predict(x)  # the wrapped model holds the trained weights
    ```

    `loss` and all metrics in the logs are those of the unperturbed weights, as
    plain training would report them. The statistics of BatchNormalization
    move once per step, from the unperturbed pass; all passes of a step see
    the same dropout masks. A step with a loss or a gradient that is not
    finite is skipped as a whole: weights, optimizer, statistics and the state
    of the method stay as they were, and `skipped_steps` counts it.

    Args:
        model: the `keras.Model` to train: Sequential, Functional or
            subclassed, built or not. Its own `compile`, `compute_loss` and
            `compute_metrics` are kept. It is compiled along with the wrapper
            and can be used by itself at any time; to train it by itself,
            without an adversary, compile it by itself. A task of KerasHub
            preprocesses what `fit`, `evaluate` and `predict` of the wrapper
            are given, as its own methods do.
        method: the name of a method (`"sam"`, `"asam"`, `"gsam"`,
            `"adaptive_gsam"`, `"bsam"`) or a `keras_sharp.methods.Method`;
            `None` is plain training. Defaults to `"sam"`. The attribute
            `method` may be set later: see
            `keras_sharp.callbacks.SwitchMethod`.
        num_micro_batches: Integer >= 1. Into how many parts a batch is split,
            each of which gets a perturbation of its own; the directions are
            averaged (m-sharpness). Defaults to `1`. In BatchNormalization
            each part is normalized by itself, as on several devices.
        name: String, the name of the model. Defaults to `None`, a name made
            by Keras.
        perturbation_scope: what the adversary sees if several devices or
            processes, the replicas, share the training. `"global"`: the batch
            of all replicas, as one device would. `"replica"`: each replica is
            perturbed by its own part of the batch, and the directions are
            averaged: m-sharpness, with less communication. Defaults to
            `"global"`; on one device both are the same.
        perturb: which weights take part in the perturbation; the others are
            trained all the same. One of `"all"`, `"no_bias_no_norm"` (neither
            biases nor the weights of normalization layers), `"norm_only"`
            (only those, as SAM-ON: [Mueller et al., 2023](
            https://arxiv.org/abs/2306.04226)), or a function that receives a
            variable and returns a Boolean. Defaults to `"all"`.
        fresh_noise: Boolean. If `True`, the perturbed passes draw dropout
            masks of their own. Defaults to `False`: the same masks in all
            passes, so that the passes differ by the perturbation alone.
        extra_logs: which of `"perturbed_loss"`, `"sharpness"` (perturbed minus
            clean loss; `fit` warns where float32 cannot tell them apart),
            `"grad_norm"`, `"grad_cosine"` (of the gradients at the weights
            and at the adversary) and `"skipped_steps"` to add to the logs of
            training. Defaults to `()`: only `"rho"`.

    Raises:
        ValueError: if an argument is not one of these, if the model is
            wrapped already, or has a `train_step` of its own.

    Example:

    >>> inner = keras.Sequential([keras.layers.Dense(8, "relu"), keras.layers.Dense(1)])
    >>> model = keras_sharp.SharpnessAwareModel(inner, method="gsam")
    >>> model.compile("adam", "mse")
    >>> logs = model.train_on_batch(np.ones((8, 4)), np.ones((8, 1)), return_dict=True)
    >>> sorted(logs)
    ['loss', 'rho']

    Reference:
        - [Foret et al., 2021](https://arxiv.org/abs/2010.01412)
    """

    def __new__(cls, *args, **kwargs):
        _check_arguments(kwargs, inspect.signature(cls.__init__).parameters)
        return super().__new__(cls, *args, **kwargs)

    def __init__(
        self,
        model,
        method="sam",
        num_micro_batches=1,
        name=None,
        *,
        perturbation_scope="global",
        perturb="all",
        fresh_noise=False,
        extra_logs=(),
    ):
        _check_model(model)
        if (
            isinstance(num_micro_batches, bool)
            or not isinstance(num_micro_batches, int)
            or num_micro_batches < 1
        ):
            raise ValueError(
                "`num_micro_batches`, the number of parts into which a batch is split, must be an "
                f"integer >= 1. Received: num_micro_batches={num_micro_batches!r}"
            )
        if perturbation_scope not in SCOPES:
            raise ValueError(
                f"`perturbation_scope` must be one of {list(SCOPES)}. Received: "
                f"perturbation_scope={perturbation_scope!r}."
                f"{did_you_mean(str(perturbation_scope), SCOPES)}"
            )
        if not isinstance(fresh_noise, bool):
            raise ValueError(
                f"`fresh_noise` must be True or False. Received: fresh_noise={fresh_noise!r}"
            )
        # The wrapped model converts its inputs by itself.
        super().__init__(name=name, dtype=model.dtype_policy, autocast=False)
        self.model = model
        self.num_micro_batches = num_micro_batches
        self.perturbation_scope = perturbation_scope
        self.perturb = perturb
        self.fresh_noise = fresh_noise
        self.extra_logs = _check_extra_logs(extra_logs)
        self._takes_part = get_choice(perturb)
        self._checked = self._told_of_freezing = False
        self._frozen = {}
        self._largest_batch = 0
        self.progress = saving.Progress()

        self.skipped_steps = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False, name="skipped_steps"
        )
        self.highest_learning_rate = self.add_weight(
            shape=(), dtype=full_precision(), initializer="zeros", trainable=False, name="max_lr"
        )
        self.hyperparameter_variables, self.method_state = [], None
        self.method = method
        self._extra_metrics = [
            keras.metrics.Mean(name=key) for key in self.extra_logs if key != "skipped_steps"
        ]
        self._follow_freezing()

    def __setattr__(self, name, value):
        if isinstance(getattr(type(self), name, None), property):
            # Past torch.nn.Module, which would take a module for a part of that name.
            object.__setattr__(self, name, value)
            return
        if "_method" in vars(self) and not name.startswith("_"):
            self._check_attribute(name, value)
        super().__setattr__(name, value)

    def _check_attribute(self, name, value):
        """Refuse an attribute that would be taken and do nothing."""
        if name not in _FIXED and hasattr(self, name):
            return
        received = f"Received: {name}={value!r}."
        if name in _FIXED:
            raise AttributeError(
                f"`{name}` of a SharpnessAwareModel is fixed when it is made. {received} Wrap the "
                f"plain model once more, with another `{name}`, and compile the new wrapper: "
                "SharpnessAwareModel(model.model, ...)."
            )
        numbers = {*self.method.settings, *methods.hyperparameters()}
        if name in numbers:
            raise AttributeError(
                f"`{name}` is a number of the method, and no attribute of the SharpnessAwareModel "
                f"around it. {received} Write `model.method.{name} = {value!r}`."
            )
        known = meant(name, [*numbers, *_FIXED, "method"])
        if known is not None:
            raise AttributeError(
                f"A SharpnessAwareModel has no attribute `{name}`. {received} Did you mean "
                f"`{f'method.{known}' if known in numbers else known}`?"
            )

    @property
    def method(self):
        """The method that trains the model: a `keras_sharp.methods.Method`.

        It may be set at any time to what the constructor takes. Weights,
        optimizer and statistics stay; the new method starts without memory.
        """
        return self._method

    @method.setter
    def method(self, method):
        method = methods.get(method)
        state = self._initial_state(method)  # It may raise: nothing has changed yet.
        before = getattr(self, "_method", method), self.method_state
        self._hold(method, state)
        try:
            if self.train_function is not None:  # It was made for the old method.
                self.make_train_function(force=True)
        except Exception:
            self._hold(*before)
            raise

    def _hold(self, method, state):
        """Have a method and its memory, which are saved and carried along with the weights."""
        old = [*self.hyperparameter_variables, *(self.method_state or [])]
        with engine.exchanging_variables(self, old):
            self._method = method
            self.hyperparameter_variables = [s.variable for s in method.settings.values()]
            self.method_state = state

    def _initial_state(self, method):
        """The variables for the memory of a method; `None` while there are no weights."""
        if not self._has_weights():
            return None
        arrays = method.initial_state(self.model.trainable_variables)
        return [
            keras.Variable(
                # A function, so that variables can be made in a pass as well.
                lambda shape, dtype, a=a: ops.convert_to_tensor(a, dtype),
                shape=a.shape,
                dtype=str(a.dtype),
                trainable=False,
                name=f"method_state_{i}",
            )
            for i, a in enumerate(_check_state(method, arrays))
        ]

    def _remember(self):
        """Give the method its memory, if it has none yet and there are weights."""
        if self.method_state is None and self._has_weights():
            state = self._initial_state(self.method)
            with engine.exchanging_variables(self, []):  # It may be built, and so be locked.
                self.method_state = state

    # Building and calling

    @property
    def built(self):
        """Whether the wrapped model is built: there is nothing else to build."""
        model = getattr(self, "model", None)  # Keras asks before it is set.
        return model is not None and model.built

    @built.setter
    def built(self, value):
        """Keras sets this on its own, which does not make a model of it."""

    def build(self, *args, **kwargs):
        """Build the wrapped model, as its own `build` does.

        Args:
            *args: what the `build` of the wrapped model takes: the shape of
                the inputs.
            **kwargs: see `args`.
        """
        if args or kwargs:  # Keras gives none in a call, where the wrapped model builds itself.
            self.model.build(*args, **kwargs)
        self._remember()

    def _has_weights(self):
        """Whether the weights are there: Keras calls some models built that have none yet."""
        return self.model.built and bool(self.model.weights)

    def get_build_config(self):
        """What `build_from_config` takes: that of the wrapped model."""
        return self.model.get_build_config()

    def build_from_config(self, config):
        """Build the wrapped model from what `get_build_config` returned."""
        self.model.build_from_config(config)
        self._remember()

    @property
    def weights(self):
        """The weights of the wrapped model, in its order.

        So are those of `get_weights` and `set_weights`, and what `count_params`
        counts. The counters of the wrapper, the hyperparameters and the memory
        of the method are variables of the training, as those of an optimizer
        are: files hold them, lists of weights do not.
        """
        return self.model.weights

    def call(self, inputs, training=None):
        outputs = self.model(inputs, training=training)
        self._remember()
        return outputs

    # Compiling

    def compile(self, *args, **kwargs):
        """Configure the model for training, as the `compile` of the wrapped model does.

        The wrapped model is compiled along, with the same optimizer, loss and
        metrics. If it has defaults for them, as the tasks of KerasHub do, they
        hold for the wrapper, too. What the wrapped model was compiled with
        before is replaced; if it is compiled by itself later, the wrapper has
        to be compiled again before it trains or evaluates.

        Args:
            *args: see `keras.Model.compile`.
            **kwargs: see `keras.Model.compile`.
        """
        self.model.compile(*args, **kwargs)
        bound = inspect.signature(self.model.compile).bind(*args, **kwargs)
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        super().compile(
            optimizer=self.model.optimizer,
            loss=self.model.loss,
            **{name: given[name] for name in _HOW_TO_RUN if name in given},
        )
        engine.share_compiled_state(self.model, self)
        warn_of_plain_training(self.model, self.name)
        self._checked = self._told_of_freezing = False
        self._follow_freezing()
        self._check_reduction()

    def get_compile_config(self):
        """The arguments of `compile`: those that the wrapped model was compiled with."""
        return self.model.get_compile_config() if self.compiled else {}

    def compile_from_config(self, config):
        """Compile with what `get_compile_config` returned."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.model.built:
            self.optimizer.build(self.trainable_variables)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The loss of the wrapped model, regularizers and `add_loss` included."""
        return compute_loss(self.model, x, y, y_pred, sample_weight, training)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """The metrics of the wrapped model."""
        logs = self.model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        clash = self._own_logs() & logs.keys()
        if clash:
            raise ValueError(
                f"The model has metrics named {sorted(clash)}, as logs of the wrapper are: one "
                "would hide the other. Give the metrics other names."
            )
        return logs

    @property
    def metrics(self):
        """The metrics of the wrapped model, and those of `extra_logs`."""
        return [*self.model.metrics, *self._extra_metrics] if self.compiled else []

    def get_metrics_result(self):
        """The results that `evaluate` reports: those of the wrapped model."""
        return self.model.get_metrics_result()

    # Training

    def make_train_function(self, force=False):
        """Check what can be checked before the first step, then do as Keras does."""
        engine.global_seeds()  # Made here, not while a function is traced.
        self._check_reduction()
        if force or self.train_function is None:
            self._check_hyperparameters()
        self._check_frozen()
        if self._has_weights():
            self._check_trainable()
            self._remember()
            engine.broadcast([*self.variables, *self.optimizer.variables])
        return super().make_train_function(force)

    def fit(self, x=None, y=None, batch_size=None, *args, **kwargs):
        """Train the model, as `keras.Model.fit` does.

        Args:
            x: see `keras.Model.fit`.
            y: see `keras.Model.fit`.
            batch_size: see `keras.Model.fit`.
            *args: see `keras.Model.fit`.
            **kwargs: see `keras.Model.fit`.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            ValueError: if the model was not compiled, has no trainable
                weights, or if a batch is too small for `num_micro_batches`.
        """
        self._check_compiled("fit")
        bound = inspect.signature(super().fit).bind(x, y, batch_size, *args, **kwargs)
        bound.apply_defaults()
        saving.check_callbacks(bound.arguments["callbacks"])
        arguments = preprocess_fit(self.model, bound.arguments)
        if self.num_micro_batches > 1:
            self._check_batch_size(_first_batch_size(arguments["x"], batch_size))
        skipped_before = int(ops.convert_to_numpy(self.skipped_steps))
        is_first = int(ops.convert_to_numpy(self.optimizer.iterations)) == 0
        history = super().fit(**arguments)
        skipped = int(ops.convert_to_numpy(self.skipped_steps)) - skipped_before
        if skipped and not self._scales_loss_dynamically():
            warnings.warn(
                f"{skipped} training steps were skipped, because a loss or a gradient was not "
                "finite. The weights were left as they were. Look for NaN or inf in the data, "
                "lower the learning rate or rho, or clip the gradients. A function of the step "
                "that gives a negative number or NaN for rho makes a step be skipped, too.",
                stacklevel=2,
            )
        rounding.warn_of_logs(history.history)
        if is_first:
            cold_start.warn_of_logs(history.history)
        return history

    def evaluate(
        self, x=None, y=None, batch_size=None, verbose="auto", sample_weight=None, *args, **kwargs
    ):
        """The loss and the metrics of the wrapped model, as `keras.Model.evaluate` does."""
        self._check_compiled("evaluate")
        if not engine.is_validation_of_fit(kwargs):  # `fit` has preprocessed it already.
            x, y, sample_weight = preprocess_data(self.model, (x, y, sample_weight), batch_size)
        return super().evaluate(x, y, batch_size, verbose, sample_weight, *args, **kwargs)

    def predict(self, x, batch_size=None, *args, **kwargs):
        """The predictions of the wrapped model, as `keras.Model.predict` does."""
        x, _, _ = preprocess_data(self.model, (x, None, None), batch_size)
        return super().predict(x, batch_size, *args, **kwargs)

    def train_on_batch(self, x, y=None, sample_weight=None, class_weight=None, return_dict=False):
        """One step of training, as `keras.Model.train_on_batch` does.

        Args:
            x: see `keras.Model.train_on_batch`.
            y: see `keras.Model.train_on_batch`.
            sample_weight: see `keras.Model.train_on_batch`.
            class_weight: see `keras.Model.train_on_batch`.
            return_dict: Boolean. If `True`, all logs are returned, with
                `"rho"` and `extra_logs` among them. Defaults to `False`: what
                the plain model returns.

        Returns:
            The loss; or a list with the loss and the metrics; or a dictionary.
        """
        self._check_compiled("train_on_batch")
        x, y, sample_weight = preprocess_batch(self.model, x, y, sample_weight)
        logs = super().train_on_batch(x, y, sample_weight, class_weight, return_dict=True)
        if return_dict:
            return logs
        own = self._own_logs()
        return engine.in_order(self.model, {k: v for k, v in logs.items() if k not in own})

    def _own_logs(self):
        """The names of the logs that the plain model does not have."""
        return {*self.extra_logs, *({"rho"} & self.method.settings.keys())}

    def test_on_batch(self, x, y=None, sample_weight=None, *args, **kwargs):
        """The loss and the metrics of a batch, as `keras.Model.test_on_batch` does."""
        self._check_compiled("test_on_batch")
        batch = preprocess_batch(self.model, x, y, sample_weight)
        return super().test_on_batch(*batch, *args, **kwargs)

    def predict_on_batch(self, x):
        """The predictions for a batch, as `keras.Model.predict_on_batch` does."""
        x, _, _ = preprocess_batch(self.model, x)
        return super().predict_on_batch(x)

    def sharpness_aware_step(self, data):
        """One step of training, on any backend: the engines run it as `train_step`.

        Args:
            data: a batch, as Keras hands it to `train_step`.

        Returns:
            The logs, a dictionary.
        """
        self._check_trainable()
        x, y, sample_weight = batch = keras.utils.unpack_x_y_sample_weight(data)
        size = _batch_size(x)
        hyperparameters, moved = self._hyperparameters_of_step()
        loss = TrainingLoss(self)
        state = loss.current_state()

        def run(carried, batch):
            noise, trackers = carried
            before = state._replace(noise=noise, trackers=trackers)
            result, after = self._run_method(loss, before, batch, hyperparameters)
            noise, statistics, trackers = after.state
            left = statistics, after.written
            return (noise, trackers), (result, left), (after.y_pred, after.masks)

        def run_parts(carried, batch):
            if self.num_micro_batches == 1:
                return run(carried, batch)
            self._check_batch_size(_batch_size(batch))
            # Each part hands seeds and metrics to the next; all else is averaged.
            return engine.average_micro_batches(run, carried, batch, self.num_micro_batches)

        carried = state.noise, state.trackers
        if self.perturbation_scope == "replica":
            outcome = engine.average_replicas(run_parts, carried, batch)
        else:
            # The result is that of all replicas already, and the same on each.
            carried, (result, left), outputs = run_parts(carried, batch)
            outcome = carried, (result, engine.mean_over_replicas(left, size)), outputs
        (noise, trackers), (result, (statistics, written)), (y_pred, masks) = outcome
        engine.set_masks(y_pred, masks)  # Gradients, and parts put together, have lost them.
        of_outputs = engine.losses_of_outputs(self.model) if self.num_micro_batches > 1 else []
        if of_outputs:
            # Compiled, Keras weighs them by batches: a part would count as much as a larger one.
            engine.update_losses_of_outputs(self.model, y, y_pred, sample_weight)
            done = {id(v) for metric in of_outputs for v in metric.variables}
            trackers = [
                None if id(v) in done else value
                for v, value in zip(loss.variables.trackers, trackers, strict=True)
            ]
        self._commit(loss, State(noise, statistics, trackers), written, moved, result)
        return self._update_logs(x, y, y_pred, sample_weight, size, result, hyperparameters)

    def _run_method(self, loss, before, batch, hyperparameters):
        """Ask the method for the direction on one (micro-)batch. Writes to no variable.

        Returns:
            A pair: a dictionary with the direction and what else the step
            needs; and the `Pass` at the weights of the model.
        """
        scale = self._loss_scale()
        size = _batch_size(batch)
        is_global = self.perturbation_scope == "global"

        def same_noise():
            return before.noise

        def next_noise():
            return (perturbed if perturbed.evaluations else clean).aux.state.noise

        def objective(noise):
            return Objective.with_aux(
                lambda w: loss(
                    w, before._replace(noise=noise()), batch, perturbed=bool(clean.evaluations)
                ),
                perturbed=[self._takes_part(v) and not is_overwritten(v) for v in loss.weights],
                biases=[is_bias(v) for v in loss.weights],
                frozen=[is_overwritten(v) for v in loss.weights],
                loss_scale=scale,
                average=(lambda t: engine.mean_over_replicas(t, size)) if is_global else None,
            )

        w = [engine.read(v) for v in loss.weights]
        clean = objective(same_noise)
        clean_loss, g = clean(w)
        # The perturbed passes will replace these.
        after, overwritten = clean.aux, clean.frozen_gradient
        # A layer may have put other weights in place of these: the gradient is that at those,
        # and around them the adversary looks.
        w = [old if new is None else new for old, new in zip(w, after.written, strict=True)]

        perturbed = objective(next_noise) if self.fresh_noise else clean
        memory = [engine.read(v) for v in self.method_state]
        direction, memory = self.method.step(perturbed, w, g, memory, **hyperparameters)
        if self.fresh_noise:  # The next step must not see the masks of the last pass again.
            after = after._replace(state=after.state._replace(noise=next_noise()))

        evaluations = clean.evaluations + (perturbed.evaluations if self.fresh_noise else [])
        finite = (
            ops.logical_and(clean.finite, perturbed.finite) if self.fresh_noise else clean.finite
        )
        if scale is not None:
            direction = vectors.scale(scale, direction)
        if not any(direction is e.gradient for e in evaluations):  # Those were checked.
            finite = ops.logical_and(finite, ops.isfinite(vectors.norm(direction)))
        if overwritten:
            direction = vectors.add(direction, overwritten)
        result = {
            "loss": clean_loss,
            "direction": list(direction),
            "method_state": list(memory),
            "finite": ops.cast(finite, "float32"),
            "extra_logs": self._extra_values(clean_loss, g, evaluations[-1]),
        }
        return result, after

    def _commit(self, loss, after, written, moved, result):
        """Write the outcome of a step into the variables, all of it or nothing."""
        # The mean over micro-batches of 1 for finite and 0 for not.
        finite = ops.logical_and(
            result["finite"] > 1 - 1e-6, ops.isfinite(self.optimizer.learning_rate)
        )
        weights, optimizer, direction = loss.weights, self.optimizer, result["direction"]
        _assign(loss.variables.trackers, after.trackers)  # They tell of skipped steps, too.
        state = [*loss.variables.noise, *loss.variables.statistics, *self.method_state]
        values = [*after.noise, *after.statistics, *result["method_state"]]
        own_skip = self._scales_loss_dynamically()

        def write():
            _assign(state, values)
            _assign(weights, written)
            for variable, value in moved:
                variable.assign(value)
            if not own_skip:
                engine.apply(optimizer, direction, weights)

        def skip():
            self.skipped_steps.assign_add(1)

        assigned = [self.skipped_steps, *state, *(variable for variable, _ in moved)]
        if own_skip:
            assigned += [v for v, value in zip(weights, written, strict=True) if value is not None]
        else:
            assigned += [*weights, *optimizer.variables]
        engine.run_either(finite, write, skip, assigned)
        if own_skip:
            # It skips the step, and lowers its scale, by itself when it sees a NaN.
            poison = ops.where(finite, 0.0, float("nan"))
            direction = vectors.map_present(lambda d: d + ops.cast(poison, d.dtype), direction)
            engine.apply(optimizer, direction, weights)

    def _update_logs(self, x, y, y_pred, sample_weight, size, result, hyperparameters):
        engine.loss_tracker(self).update_state(result["loss"], sample_weight=size)
        logs = dict(self.compute_metrics(x, y, y_pred, sample_weight))
        for metric in self._extra_metrics:
            metric.update_state(result["extra_logs"][metric.name], sample_weight=size)
            logs[metric.name] = metric.result()
        if "skipped_steps" in self.extra_logs:
            logs["skipped_steps"] = engine.read(self.skipped_steps)
        if "rho" in hyperparameters:
            logs["rho"] = hyperparameters["rho"]
        return logs

    def _extra_values(self, loss, g, adversary):
        values = {
            "perturbed_loss": lambda: adversary.loss,
            "sharpness": lambda: adversary.loss - loss,
            "grad_norm": lambda: vectors.norm(g),
            "grad_cosine": lambda: vectors.cosine(g, adversary.gradient),
        }
        return {metric.name: values[metric.name]() for metric in self._extra_metrics}

    def _hyperparameters_of_step(self):
        """The hyperparameters of this step.

        Returns:
            The values by name, a dictionary; and a list of variables that the
            step moves, each in a pair with its new value.
        """
        moved = []

        def learning_rate():
            now = ops.cast(self.optimizer.learning_rate, self.highest_learning_rate.dtype)
            highest = ops.maximum(now, engine.read(self.highest_learning_rate))
            moved.append((self.highest_learning_rate, highest))
            return now, highest

        def read(variable):  # One may follow another, which comes first.
            return next((value for v, value in moved if v is variable), engine.read(variable))

        step = ops.convert_to_tensor(self.optimizer.iterations)
        values = {}
        for name, setting in self.method.settings.items():
            values[name] = setting.value_at(step, learning_rate, read)
            if setting.schedule is not None:
                moved.append((setting.variable, values[name]))
        return values, moved

    def _loss_scale(self):
        """The factor that keeps float16 gradients from underflow, or `None`."""
        if self._scales_loss_dynamically() or self.optimizer.loss_scale_factor is not None:
            return self.optimizer.scale_loss(ops.ones((), "float32"))
        return None

    def _scales_loss_dynamically(self):
        return isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer)

    # Checks

    def _check_compiled(self, name):
        """Refuse to train or evaluate unless this wrapper was compiled, and last."""
        if not self.compiled:
            before = (
                "The model inside was compiled by itself, which the wrapper does not take over. "
                if self.model.compiled
                else ""
            )
            raise ValueError(
                f"A SharpnessAwareModel must be compiled before `{name}`, and this one, "
                f"{self.name!r}, is not. {before}Call `compile` of the wrapper, with optimizer, "
                "loss and metrics: the model inside is compiled along."
            )
        if engine.loss_tracker(self.model) is not engine.loss_tracker(self):
            raise ValueError(
                f"The model inside the SharpnessAwareModel {self.name!r} was compiled by itself, "
                "or by another wrapper, after the wrapper: losses and metrics are no longer those "
                f"that the wrapper was compiled with. Call `compile` of the wrapper before "
                f"`{name}`."
            )

    def _frozen_layers(self):
        """Whether each layer is frozen, by its `id`."""
        return {id(layer): not layer.trainable for layer in engine.all_layers(self)}

    def _freezing_has_changed(self):
        before = self._frozen
        return any(frozen != before.get(i, frozen) for i, frozen in self._frozen_layers().items())

    def _follow_freezing(self):
        """Take note of what is frozen now. The memory of the method was that of other weights."""
        if self.method_state and self._freezing_has_changed():
            self.method = self.method
        self._frozen = self._frozen_layers()

    def _check_frozen(self):
        """Tell if layers were frozen, or set free, since the training step was made."""
        if not self._freezing_has_changed() or self._told_of_freezing:
            return
        if self.train_function is None:
            self._follow_freezing()
            return
        message = (
            "`trainable` of a layer was set after the model was compiled. As in plain Keras, this "
            "takes effect when the model is compiled again: until then a step may train what it "
            "trained before, or fail. Call `compile` of the wrapper."
        )
        if not self._survives_failed_steps:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
        self._told_of_freezing, self._checked = True, False

    def _check_hyperparameters(self):
        """Refuse schedules that give no valid number for the next step."""
        for setting in self.method.settings.values():
            setting.check_at(ops.convert_to_tensor(self.optimizer.iterations), self._as_in_step)
        self.method.in_training = True

    def _check_trainable(self):
        if self._checked:
            return
        variables = self.model.trainable_variables
        if not variables:
            raise ValueError(
                f"The model {self.model.name!r} has no trainable weights: there is nothing to "
                "train or to perturb. Set `trainable = True` on some layer, and compile again."
            )
        if not any(self._takes_part(v) for v in variables):
            raise ValueError(
                f"`perturb` selects none of the {len(variables)} trainable weights of the model "
                f"{self.model.name!r}. Received: perturb={self.perturb!r}. Expected at least one "
                f"weight; the model has {[v.path for v in variables[:5]]} ..."
            )
        others = {id(v) for v in self.trainable_variables} - {id(v) for v in variables}
        if others:
            names = [v.path for v in self.trainable_variables if id(v) in others]
            raise ValueError(
                "The SharpnessAwareModel has trainable weights beside those of the model inside, "
                f"which it does not train: {names}. Make them part of the model that is wrapped."
            )
        if self._averages_parts() and any(is_overwritten(v) for v in variables):
            raise ValueError(
                "Weights of a float8 layer that are overwritten with their gradient cannot be "
                "averaged over micro-batches or replicas. Received: num_micro_batches="
                f"{self.num_micro_batches}. Set num_micro_batches=1, and train on one device."
            )
        if any(keras.backend.standardize_dtype(v.dtype) == "bfloat16" for v in variables):
            warnings.warn(
                "The model has bfloat16 weights, in whose rounding a perturbation of usual size "
                "drowns: a change of 5e-4 survives in about one weight of eight. Use the dtype "
                "policy 'mixed_bfloat16', which keeps float32 weights.",
                stacklevel=2,
            )
        engine.check_layers(self.model)
        engine.own_random_numbers(self.model)
        self._checked = True

    def _averages_parts(self):
        """Whether directions of parts of a batch are averaged."""
        return self.num_micro_batches > 1 or self._divides_batches()

    def _check_reduction(self):
        reductions = [getattr(part, "reduction", None) for part in keras.tree.flatten(self.loss)]
        if "sum" in reductions and self._averages_parts():
            raise ValueError(
                "A loss that is summed over the batch cannot be averaged over micro-batches or "
                "replicas: the step would shrink with their number. Received: a loss with "
                f"reduction='sum', num_micro_batches={self.num_micro_batches} and "
                f"perturbation_scope={self.perturbation_scope!r}. Use "
                "reduction='sum_over_batch_size'."
            )

    def _check_batch_size(self, size):
        """Refuse batches with fewer examples than parts, but for a last, partial one."""
        if not isinstance(size, int):
            return
        self._largest_batch = max(self._largest_batch, size)
        if self._largest_batch < self.num_micro_batches:
            raise ValueError(
                "`num_micro_batches` is larger than the batch: each part needs an example. "
                f"Received: num_micro_batches={self.num_micro_batches} and a batch of {size} "
                "examples. Use larger batches or fewer micro-batches."
            )

    # Saving

    def save(self, filepath, overwrite=True, zipped=None, **kwargs):
        """Save the model and the state of its training as a `.keras` file.

        Args:
            filepath: see `keras.Model.save`. The legacy format, `.h5`, is
                refused: it would leave the state of the training out.
            overwrite: see `keras.Model.save`.
            zipped: see `keras.Model.save`.
            **kwargs: see `keras.Model.save`.

        Raises:
            ValueError: if `filepath` ends in `.h5` or `.hdf5`.
        """
        saving.refuse_legacy(filepath, "save")
        return super().save(filepath, overwrite=overwrite, zipped=zipped, **kwargs)

    def load_weights(self, filepath, skip_mismatch=False, **kwargs):
        """Load what `save_weights` saved: the weights and the state of the training.

        The method of the model is then the one under which the file was saved,
        with its memory and hyperparameters; its class, and functions in it,
        must be the script's or registered with Keras. A file of the plain model
        is for the wrapped one: `model.model.load_weights(filepath)`; and a file
        of the wrapper is loaded into a plain model by
        `SharpnessAwareModel(plain_model).load_weights(filepath)`.

        Args:
            filepath: see `keras.Model.load_weights`.
            skip_mismatch: see `keras.Model.load_weights`.
            **kwargs: see `keras.Model.load_weights`.

        Raises:
            ValueError: if the file is not that of a wrapper around such a
                model, or its method can't be made. A warning says so if it was
                saved by a wrapper with other arguments.
        """
        saving.refuse_legacy(filepath, "load_weights")
        if self.model.built and not self._has_weights():  # Keras would load nothing, in silence.
            raise ValueError(
                f"The model {self.model.name!r} has no weights into which a file could be loaded: "
                "it is marked as built, but its layers are not. Call it on a batch first, or "
                "write a `build` method that builds its layers."
            )
        super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)

    def save_own_variables(self, store):
        """Save what the wrapper holds, the method, and the seeds, which Keras leaves out."""
        super().save_own_variables(store)
        for i, seed in enumerate(self._seeds()):
            store[f"seed_{i}"] = ops.convert_to_numpy(seed)
        store[saving.RECORD] = saving.record(self)

    def load_own_variables(self, store):
        """Load what `save_own_variables` saved; the method first, which has variables."""
        saved = saving.read(store)
        if saved is None:
            warnings.warn(
                "The file is of version 0.1.0, which did not say what method it was saved under. "
                f"The model goes on with its own, {type(self.method).__name__}. If that is not "
                "the one, set `model.method` and load again.",
                stacklevel=2,
            )
        else:
            method = saving.saved_method(self, saved)
            if method is not self.method:
                self.method = method
            self.progress.epochs = saved["epochs"]
            saving.warn_of_other_arguments(self, saved)
        self._remember()
        for i, seed in enumerate(self._seeds()):
            if f"seed_{i}" in store:
                seed.assign(store[f"seed_{i}"])
        names = [name for name in store.keys() if name.isdigit()]  # noqa: SIM118
        super().load_own_variables({name: store[name] for name in names})

    def _seeds(self):
        """The states of random generators: variables, but no weights, of the model."""
        weights = {id(v) for v in self.model.weights}
        return [v for v in self.model.non_trainable_variables if id(v) not in weights]

    def export(self, *args, **kwargs):
        """Export the wrapped model for inference, as `keras.Model.export` does."""
        return self.model.export(*args, **kwargs)

    def get_config(self):
        """The arguments of the constructor, as plain values."""
        if engine.is_saving_legacy_h5():  # By the functions of Keras, which pass `save` by.
            saving.refuse_legacy("model.h5", "save")
        model = keras.saving.serialize_keras_object(self.model)
        if self.compiled:  # It will be compiled along with the wrapper.
            model.pop("compile_config", None)
        return {
            "model": model,
            "method": methods.serialize(self.method),
            "num_micro_batches": self.num_micro_batches,
            "name": self.name,
            "perturbation_scope": self.perturbation_scope,
            "perturb": keras.saving.serialize_keras_object(self.perturb),
            "fresh_noise": self.fresh_noise,
            "extra_logs": list(self.extra_logs),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Make a model from what `get_config` returned."""
        config = dict(config)
        for name in ("model", "method", "perturb"):
            config[name] = keras.saving.deserialize_keras_object(
                config[name], custom_objects=custom_objects
            )
        return cls(**config)


def _assign(variables, values):
    for variable, value in zip(variables, values, strict=True):
        if value is not None:
            variable.assign(value)


def _check_state(method, arrays):
    """The memory that a method starts with, as arrays."""
    if not isinstance(arrays, (list, tuple)) or not all(hasattr(a, "dtype") for a in arrays):
        raise ValueError(
            f"`initial_state` of the method {type(method).__name__} must return a list of NumPy "
            f"arrays, what the method remembers before the first step. Received: {arrays!r}"
        )
    arrays = [np.asarray(a) for a in arrays]
    if any(a.dtype.kind in "OSUM" for a in arrays):
        raise ValueError(
            f"`initial_state` of the method {type(method).__name__} must return arrays of "
            f"numbers. Received arrays of the dtypes {[str(a.dtype) for a in arrays]}."
        )
    return arrays


def _batch_size(batch):
    return ops.shape(next(t for t in keras.tree.flatten(batch) if t is not None))[0]


def _check_arguments(given, parameters):
    """Say what to write in place of an argument that does not exist."""
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return  # A subclass that passes on what it does not know.
    for name, value in given.items():
        if name in parameters:
            continue
        if name in methods.hyperparameters():
            advice = (
                f" `{name}` is an argument of the method. Write SharpnessAwareModel(model, "
                f"keras_sharp.methods.SAM({name}={value!r})), say."
            )
        else:
            known = [p for p in parameters if p != "self"]
            advice = f"{did_you_mean(name, known)} Expected arguments from {known}."
        raise TypeError(
            f"SharpnessAwareModel has no argument `{name}`.{advice} Received: {name}={value!r}"
        )


def _check_model(model):
    if isinstance(model, SharpnessAwareModel):
        raise ValueError(
            f"The model {model.name!r} is a SharpnessAwareModel already: a wrapper cannot be "
            "wrapped. Wrap `model.model`, the plain Keras model inside, instead."
        )
    if not isinstance(model, keras.Model):
        hint = ""
        if isinstance(model, (str, methods.Method)):
            hint = " The model comes first: SharpnessAwareModel(model, method)."
        elif isinstance(model, type):
            hint = " Pass an instance of the class."
        raise ValueError(
            "SharpnessAwareModel wraps a keras.Model (Sequential, Functional or subclassed). "
            f"Received: {model!r} (of type {type(model).__name__}).{hint}"
        )
    for name, advice in _ADVICE.items():
        if not (_is_from_keras(getattr(type(model), name)) or only_preprocesses(type(model), name)):
            raise ValueError(_OVERRIDDEN.format(name=name, cls=type(model).__name__, advice=advice))


def _is_from_keras(function):
    """Whether a method is the one that keras.Model has."""
    return getattr(function, "__module__", "").split(".")[0] == "keras"


def _check_extra_logs(extra_logs):
    if isinstance(extra_logs, str):
        extra_logs = (extra_logs,)
    for name in extra_logs:
        if name not in EXTRA_LOGS:
            raise ValueError(
                f"There is no log named {name!r}.{did_you_mean(str(name), EXTRA_LOGS)} "
                f"Expected names from {list(EXTRA_LOGS)}. Received: extra_logs={extra_logs!r}"
            )
    return tuple(extra_logs)


def _first_batch_size(x, batch_size):
    """The number of examples in the first batch of `fit`, or `None` if it can't be known."""
    if hasattr(x, "element_spec"):  # tf.data, where the static shape is often unknown
        x = next(iter(x))
    elif isinstance(x, keras.utils.PyDataset):
        x = x[0]
    else:
        first = keras.tree.flatten(x)[0]
        shape = getattr(first, "shape", None)
        return min(int(shape[0]), batch_size or 32) if shape else None
    return int(keras.tree.flatten(x)[0].shape[0])
