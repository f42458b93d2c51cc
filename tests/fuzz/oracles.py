"""What must hold of a case. `check` raises `Failure` with what does not."""

import dataclasses
import tempfile

import keras
import numpy as np

from keras_sharp import SharpnessAwareModel, engine, methods, neighborhoods, policies
from tests.fuzz import formula, known, networks, programs
from tests.fuzz.programs import Schedule
from tests.models import BACKEND, assign, values


class Failure(AssertionError):
    """A case that is not as it must be."""


#: How far two float32 computations of one thing may differ: in units of the numbers themselves,
#: and of the way that training has moved them.
ROUNDING = {
    "float32": (5e-6, 3e-4),
    "float64": (5e-6, 3e-4),  # Not everything in Keras keeps float64.
    "mixed_float16": (2e-5, 2e-2),
    "float16": (2e-3, 2e-2),
    "mixed_bfloat16": (2e-5, 8e-2),
}


#: By how much of itself a weight is moved to see what rounding does; else by 1e-6. Where it is
#: rounded to fewer bits before it is used, less would change nothing.
SHAKEN = {"float16": 1e-3, "mixed_float16": 1e-4, "mixed_bfloat16": 1e-3}

#: How far two programs that compute one prediction may differ, where layers compute in less than
#: float32: XLA rounds between two operations, or does not.
PREDICTED = {"float16": 2e-3, "mixed_float16": 1e-3, "mixed_bfloat16": 8e-3}


@keras.saving.register_keras_serializable(package="tests.fuzz")
def no_bias(variable):
    """A choice of weights to perturb, as a user may write it."""
    return "bias" not in variable.name


def method(case):
    """The method of a case, in its policy."""
    if case.method is None:
        return None
    made = _method(case)
    return {
        None: lambda: made,
        "every_2": lambda: policies.Every(made, 2),
        "from_1": lambda: policies.From(made, 1),
        "until_1": lambda: policies.Until(made, 1),
        "from_every": lambda: policies.From(policies.Every(made, 2), 1),
    }[case.policy]()


def _method(case):
    kwargs = {
        **formula.NUMBERS.get(case.method, {}),
        "ascent_steps": case.ascent_steps,
        "second_order": case.second_order,
    }
    if case.method in ("momentum_sam", "async_sam"):
        del kwargs["ascent_steps"], kwargs["second_order"]
    if case.method not in ("asam", "adaptive_gsam"):
        kwargs["neighborhood"] = {
            "ball_3": neighborhoods.Ball(3),
            "ball_inf": neighborhoods.Ball(float("inf")),
            "adaptive_3": neighborhoods.AdaptiveBall(p=3),
        }.get(case.neighborhood, case.neighborhood)
    rho = Schedule(case.rho) if case.scheduled else case.rho
    name = "sam" if case.method == "ascent_share" else case.method
    return methods.METHODS[name](rho=rho, **kwargs)


def _start(case, jitter=None):
    """A model, built unless the case says otherwise, with weights that are all at work."""
    model = networks.build(case)
    if BACKEND == "torch" and model.built:
        # Plain Keras draws from PyTorch's generator there, what is wrapped from its own seeds.
        engine.own_random_numbers(model)
    if model.built:
        networks.move_off_the_start(model, case.seed)
        _shake(case, model, jitter)
    return model


def _shake(case, model, jitter):
    """Change the weights by what rounding may; not for a `jitter` of `None`."""
    if jitter is not None:
        rng = np.random.default_rng(jitter)
        for v in model.trainable_variables:
            old = values([v])[0]
            unit = SHAKEN.get(case.dtype, 1e-6)
            assign([v], [(old * (1 + unit * rng.normal(size=old.shape))).astype(old.dtype)])


def wrapped(case, mode=None):
    """A compiled wrapper."""
    wrapper = SharpnessAwareModel(
        _start(case),
        method(case),
        case.micro_batches,
        perturb=no_bias if case.perturb == "function" else case.perturb,
        extra_logs=("perturbed_loss", "sharpness", "grad_norm", "grad_cosine")
        if case.extra_logs
        else (),
    )
    wrapper.compile(**programs.compile_arguments(case, mode))
    return wrapper


def _seed(case, offset=0):
    keras.utils.set_random_seed(case.seed % 2**31 + 1 + offset)


class Checker:
    """Runs a case and compares."""

    def __init__(self, case):
        self.case = case
        self.data, self.validation = programs.data(case), programs.data(case, seed=1)
        self.first = None  # The weights before training.
        self.differences = []
        #: Whether rounding alone moves this case so far that the usual tolerance was not enough.
        self.unstable = False

    def run(self):
        """Everything that the case asks for."""
        case = self.case
        wrapper = wrapped(case)
        result = self.train(wrapper)
        reference = self.plain if known.plain_is_reference(case) else self.by_hand
        shown = result.without_added_logs() if reference == self.plain else result
        expected, clone = reference()
        self.compare(shown, expected, reference.__name__, lambda j: reference(j)[0])
        if case.judged:
            self.check_evaluation(wrapper, clone)
        if case.again:
            self.compare(self.train(wrapped(case)), result, "again", exact=True)
        if case.other_mode:
            self.check_other_mode(result)
        if case.resume:
            self.check_resume(wrapper)
        if self.differences:
            raise Failure("\n".join(self.differences))

    def train(self, wrapper, seed=0):
        if self.first is None:
            model = wrapper.model
            if not model.built:
                model = _start(self.case)
                model(networks.example(self.case))
            self.first = values(model.trainable_variables)
        _seed(self.case, seed)
        logs = programs.train(wrapper, self.case, self.data, self.validation)
        return programs.outcome(wrapper.model, self.first, logs)

    def plain(self, jitter=None):
        """Plain Keras."""
        if self.first is None:
            self.first = values(_start(self.case).trainable_variables)
        model = _start(self.case, jitter)
        model.compile(**programs.compile_arguments(self.case))
        _seed(self.case)
        logs = programs.train(model, self.case, self.data, self.validation)
        return programs.outcome(model, self.first, logs), model

    def by_hand(self, jitter=None):
        """The formula."""
        case = dataclasses.replace(self.case, built=True)
        model = _start(self.case, jitter)
        if not model.built:
            model(networks.example(case))
            _shake(case, model, jitter)
        model.compile(**programs.compile_arguments(case, "eager"))
        model._symbolic_build(data_batch=self.data.part(0, case.batch_size))  # As `fit` does.
        _seed(case)
        logs = formula.train(model, case, self.data, self.validation)
        return programs.outcome(model, self.first, logs), model

    def check_evaluation(self, wrapper, clone):
        """Wrapper, model inside and reference give the same predictions and figures."""
        x, y, weight = self.validation.part(0, len(self.validation))
        size = self.case.batch_size

        def judge(model):
            found = model.evaluate(x, y, size, sample_weight=weight, verbose=0, return_dict=True)
            return keras.tree.flatten(model.predict(x, size, verbose=0)), found

        (outer, outer_logs), (inner, inner_logs) = judge(wrapper), judge(wrapper.model)
        self.same("predict of wrapper and model inside", outer, inner)
        self.same_logs("evaluate of wrapper and model inside", [outer_logs], [inner_logs])
        if not self.unstable:
            predictions, logs = judge(clone)
            self.same("predict of wrapper and reference", outer, predictions, coarse=True)
            self.same_logs("evaluate of wrapper and reference", [outer_logs], [logs], coarse=True)

    def check_other_mode(self, result):
        for mode in ("graph", "xla") if self.case.mode == "eager" else ("eager",):
            if mode == "xla" and BACKEND != "tensorflow":
                continue
            other = self.train(wrapped(self.case, mode))
            self.compare(other, result, f"{mode} is {self.case.mode}", lambda j: self.by_hand(j)[0])

    def check_resume(self, wrapper):
        """Saved, loaded and gone on is gone on."""
        case = self.case
        with tempfile.TemporaryDirectory() as folder:
            wrapper.save(f"{folder}/model.keras")
            loaded = keras.models.load_model(f"{folder}/model.keras")
        before = [programs.outcome(m.model, self.first, []) for m in (loaded, wrapper)]
        self.compare(*before, "loaded is saved", exact=True)
        self.data = programs.data(case, seed=2)
        ends = [self.train(m, seed=i) for i, m in enumerate((loaded, wrapper))]
        self.compare(*ends, "resumed", lambda j: self.by_hand(j)[0])

    # Comparing

    def compare(self, actual, expected, what, again=None, exact=False):
        """Note the differences of two outcomes.

        Args:
            actual: an `Outcome`.
            expected: an `Outcome`.
            what: a word for the message.
            again: function of a number, makes `expected` once more from weights that differ by
                rounding. Where those differences grow, so much more is allowed.
            exact: whether each bit must be equal.
        """
        found = list(self.find(actual, expected, exact))
        if found and again is not None and not exact:
            self.unstable = True
            shaken = [self.find(again(j), expected, exact, everything=True) for j in (1, 2, 3)]
            allowed = {}
            for key, _, size, _ in (d for one in shaken for d in one):
                allowed[key] = max(allowed.get(key, 0.0), size)
            found = [d for d in found if not d[2] <= d[3] + 20 * allowed.get(d[0], 0.0)]
        self.differences += [
            f"{what}: {text}, off by {size:.2g} (allowed {limit:.2g})"
            for _, text, size, limit in found
        ]

    def find(self, actual, expected, exact=False, everything=False):
        """Differences: a key, a text, the size and what is allowed."""
        unit, moved = ROUNDING[self.case.dtype]
        if BACKEND == "tensorflow" and self.case.second_order:
            # There, the formula takes differences of gradients: right to some thousandths.
            unit, moved = 5e-3, 10 * moved
        path = expected.movement
        for kind in ("weights", "state", "slots"):
            ours, theirs = getattr(actual, kind), getattr(expected, kind)
            if len(ours) != len(theirs):
                yield kind, f"{len(ours)} {kind} in place of {len(theirs)}", np.inf, 0
                continue
            for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                limit = 0 if exact else unit * (1 + _size(b)) + moved * min(path, 1 + _size(b))
                size = _distance(a, b)
                if everything or not size <= limit:
                    yield (kind, i), f"{kind}[{i}] of shape {a.shape}", size, limit
        for i, (a, b) in enumerate(zip(actual.logs, expected.logs, strict=True)):
            if set(a) != set(b):
                yield ("keys", i), f"logs {sorted(a)} in place of {sorted(b)}", np.inf, 0
            for name in sorted(set(a) & set(b)):
                limit = 0 if exact else (unit * 4 + moved) * (1 + _size(b[name]))
                size = _distance(a[name], b[name])
                if everything or not size <= limit:
                    text = f"logs[{i}][{name!r}] = {a[name]:.6g}, not {b[name]:.6g}"
                    yield ("logs", i, name), text, size, limit

    def same(self, what, actual, expected, coarse=False):
        unit, moved = ROUNDING[self.case.dtype]
        unit = max(unit, PREDICTED.get(self.case.dtype, 0))
        unit = 10 * (unit + moved) if coarse else unit  # Of weights that differ by rounding.
        for a, b in zip(actual, expected, strict=True):
            if not _distance(a, b) <= unit * (1 + _size(b)):
                self.differences.append(f"{what}: off by {_distance(a, b):.2g}")

    def same_logs(self, what, actual, expected, coarse=False):
        for a, b in zip(actual, expected, strict=True):
            if set(a) != set(b):
                self.differences.append(f"{what}: {sorted(a)} in place of {sorted(b)}")
            for name in sorted(set(a) & set(b)):
                self.same(f"{what}, {name!r}", [np.asarray(a[name])], [np.asarray(b[name])], coarse)


def _size(a):
    return float(np.max(np.abs(a), initial=0.0)) if np.all(np.isfinite(a)) else 0.0


def _distance(a, b):
    if a.shape != b.shape:
        return np.inf
    if np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
        return 0.0
    return float(np.max(np.abs(a.astype("float64") - b.astype("float64")), initial=0.0))


def check(case):
    """Raise `Failure`, or whatever the program raises, if the case is not as it must be.

    Returns:
        Whether the case is one that rounding moves far.
    """
    keras.config.set_dtype_policy(case.dtype)
    try:
        checker = Checker(case)
        checker.run()
    finally:
        keras.config.set_dtype_policy("float32")
    return checker.unstable
