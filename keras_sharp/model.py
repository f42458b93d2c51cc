"""`SharpnessAwareModel`: the wrapper that trains a Keras model with a method."""

import inspect
import random
import warnings

import keras
import numpy as np
from keras import ops

from keras_sharp import cold_start, engine, methods, policies, rounding, saving
from keras_sharp.batches import size_of_first
from keras_sharp.delegation import Delegation, warn_of_plain_training
from keras_sharp.identifiers import check_boolean, check_count, did_you_mean, meant
from keras_sharp.preprocessing import preprocess_batch, preprocess_data, preprocess_fit
from keras_sharp.schedules import full_precision
from keras_sharp.training import checks
from keras_sharp.training.logs import ExtraLogs
from keras_sharp.training.loss import compute_loss
from keras_sharp.training.step import Step, scales_loss_dynamically
from keras_sharp.weights import get_choice

#: The choices of `perturbation_scope`.
SCOPES = ("global", "replica")

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
            `keras_sharp.callbacks.SwitchMethod`. Models that share one
            instance share its numbers, and where a schedule has left them.
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
            variable and returns a Boolean. Defaults to `"all"`. A method that
            needs the gradient at the weights for its adversary alone, as SAM,
            ASAM and ESAM do, then takes that of the perturbed weights only.
        fresh_noise: Boolean. If `True`, the perturbed passes draw dropout
            masks of their own. Defaults to `False`: the same masks in all
            passes, so that the passes differ by the perturbation alone.
        extra_logs: which of `"perturbed_loss"`, `"sharpness"` (perturbed minus
            clean loss; `fit` warns where float32 cannot tell them apart),
            `"grad_norm"`, `"grad_cosine"` (of the gradients at the weights
            and at the adversary), `"num_gradients"` (how many a step takes,
            in gradients of the whole batch; one of the perturbed weights alone
            counts as one) and `"skipped_steps"` to add to the logs of training.
            For `"grad_norm"` and `"grad_cosine"` the gradient of all weights is
            taken, whatever `perturb` is. Those that tell of the adversary are means
            over the steps that look for it, and NaN where none did. Defaults
            to `()`: only `"rho"`.

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
        checks.check_arguments(kwargs, inspect.signature(cls.__init__).parameters)
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
        checks.check_model(model)
        parts = "the number of parts into which a batch is split"
        check_count("num_micro_batches", num_micro_batches, at_least=1, meaning=parts)
        if perturbation_scope not in SCOPES:
            raise ValueError(
                f"`perturbation_scope` must be one of {list(SCOPES)}. Received: "
                f"perturbation_scope={perturbation_scope!r}."
                f"{did_you_mean(str(perturbation_scope), SCOPES)}"
            )
        check_boolean("fresh_noise", fresh_noise)
        # The wrapped model converts its inputs by itself.
        super().__init__(name=name, dtype=model.dtype_policy, autocast=False)
        self.model = model
        self.num_micro_batches = num_micro_batches
        self.perturbation_scope = perturbation_scope
        self.perturb = perturb
        self.fresh_noise = fresh_noise
        self.extra_logs = (extra_logs,) if isinstance(extra_logs, str) else tuple(extra_logs)
        self._means = ExtraLogs(self.extra_logs)
        self._extra_metrics = self._means.metrics  # Keras looks for them in attributes.
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
        arrays, seed = method.initial_state(self.model.trainable_variables), []
        if method.draws_random_numbers:
            # From Python's generator, which `keras.utils.set_random_seed` sets.
            seed.append(np.array(random.randrange(2**30), "int32"))
        return [
            keras.Variable(
                # A function, so that variables can be made in a pass as well.
                lambda shape, dtype, a=a: ops.convert_to_tensor(a, dtype),
                shape=a.shape,
                dtype=str(a.dtype),
                trainable=False,
                name=f"method_state_{i}",
            )
            for i, a in enumerate([*checks.check_state(method, arrays), *seed])
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
        checks.check_reduction(self, self._averages_parts())

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
        checks.check_reduction(self, self._averages_parts())
        checks.check_by_pass(self.method, self.optimizer)
        if force or self.train_function is None:
            self._check_hyperparameters()
        self._check_frozen()
        if self._has_weights():
            self._check_weights()
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
        checks.check_compiled(self, "fit")
        bound = inspect.signature(super().fit).bind(x, y, batch_size, *args, **kwargs)
        bound.apply_defaults()
        saving.check_callbacks(bound.arguments["callbacks"])
        arguments = preprocess_fit(self.model, bound.arguments)
        if self.num_micro_batches > 1:
            self._check_batch_size(size_of_first(arguments["x"], batch_size))
        skipped_before = int(ops.convert_to_numpy(self.skipped_steps))
        is_first = int(ops.convert_to_numpy(self.optimizer.iterations)) == 0
        arguments["callbacks"] = _with(_TellsLength(), arguments["callbacks"])
        history = super().fit(**arguments)
        skipped = int(ops.convert_to_numpy(self.skipped_steps)) - skipped_before
        if skipped and not scales_loss_dynamically(self.optimizer):
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
        checks.check_compiled(self, "evaluate")
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
        checks.check_compiled(self, "train_on_batch")
        if isinstance(self.method, policies.Policy) and not self.method.knows_length:
            self.method.set_length(None)  # Raises: nobody will tell.
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
        checks.check_compiled(self, "test_on_batch")
        batch = preprocess_batch(self.model, x, y, sample_weight)
        return super().test_on_batch(*batch, *args, **kwargs)

    def predict_on_batch(self, x):
        """The predictions for a batch, as `keras.Model.predict_on_batch` does."""
        x, _, _ = preprocess_batch(self.model, x)
        return super().predict_on_batch(x)

    def sharpness_aware_step(self, data):
        """One step of training, on any backend: what Keras takes for `train_step`.

        Args:
            data: a batch, as Keras hands it to `train_step`.

        Returns:
            The logs, a dictionary.
        """
        self._check_weights()
        return Step(self, self._takes_part, self._means, self._check_batch_size)(data)

    # Checks

    def _check_weights(self):
        """Check, once, what can be checked when the weights are there."""
        if not self._checked:
            checks.check_trainable(self, self._takes_part, self._averages_parts())
            engine.own_random_numbers(self.model)
            self._checked = True

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

    def _averages_parts(self):
        """Whether directions of parts of a batch are averaged."""
        return self.num_micro_batches > 1 or self._divides_batches()

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


class _TellsLength(keras.callbacks.Callback):
    """Tells a policy how many steps the training has."""

    def on_epoch_begin(self, epoch, logs=None):
        method, steps = self.model.method, self.params["steps"]
        if isinstance(method, policies.Policy):
            done = int(ops.convert_to_numpy(self.model.optimizer.iterations))
            to_come = None if steps is None else (self.params["epochs"] - epoch) * steps
            method.set_length(None if to_come is None else done + to_come)


def _with(callback, callbacks):
    """The callbacks of `fit`, and one more that comes last."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.append(callback)
        return callbacks
    return [*keras.tree.flatten([] if callbacks is None else callbacks), callback]
