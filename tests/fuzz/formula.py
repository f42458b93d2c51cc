"""The step of each method by hand: the papers' formulas, and the backend's own autodiff.

Nothing here imports keras_sharp. A plain, compiled Keras model is trained: perturbed weights
are assigned to its variables, the gradient is taken there, and everything is put back. All
weights with a gradient stand in one long vector.
"""

import copy
import importlib

import keras
import numpy as np
from keras import ops

from tests import models
from tests.fuzz.programs import Schedule
from tests.models import BACKEND, assign, values

adapter = importlib.import_module(f"tests.fuzz._{BACKEND}")


def train(model, case, data, validation=None):
    """Train a compiled model by hand, as `programs.train` lets `fit` do it: the logs."""
    hand = _Hand(model, case)
    logs = []
    for _ in range(case.epochs):
        if case.call == "fit":
            hand.reset()
        for batch in data.batches(case.batch_size):
            if case.call == "train_on_batch":  # It reports on this batch alone.
                hand.reset()
            hand.step(batch)
            if case.call == "train_on_batch":
                logs.append(hand.logs())
        if case.call == "fit":
            logs.append(hand.logs())
            if case.validation:
                x, y, weight = validation.part(0, len(validation))
                found = model.evaluate(
                    x, y, case.batch_size, sample_weight=weight, verbose=0, return_dict=True
                )
                logs[-1].update({f"val_{k}": np.array(v) for k, v in found.items()})
    if case.call == "fit":
        model.optimizer.finalize_variable_values(model.trainable_variables)
    return logs


class _Hand:
    def __init__(self, model, case):
        self.model, self.case = model, case
        self.highest_learning_rate = 0.0
        self.reset()

    def reset(self):
        self.model.reset_metrics()
        self.seen, self.extra = 0, {}

    def logs(self):
        logs = {k: np.array(ops.convert_to_numpy(v)) for k, v in self.model.get_metrics_result().items()}
        if self.case.extra_logs:
            logs.update({k: np.array(v / self.seen) for k, v in self.extra.items()})
        if self.case.method is not None:
            logs["rho"] = np.array(self.rho)
        return logs

    def hyperparameters(self):
        case, optimizer = self.case, self.model.optimizer
        rate = float(ops.convert_to_numpy(optimizer.learning_rate))
        self.highest_learning_rate = max(self.highest_learning_rate, rate)
        self.rho = case.rho
        if case.scheduled:
            step = int(ops.convert_to_numpy(optimizer.iterations))
            self.rho = float(Schedule(case.rho)(step))
        self.rho_min = self.rho_max() * rate / self.highest_learning_rate

    def rho_max(self):
        """BSAM's lower radius follows its upper one, where nothing else is said."""
        return self.rho

    def step(self, batch):
        """One step of training."""
        case, model = self.case, self.model
        self.hyperparameters()
        size = len(keras.tree.flatten(batch[0])[0])
        variables = [*model.trainable_variables, *model.non_trainable_variables]
        floats = [keras.backend.is_float_dtype(v.dtype) for v in variables]
        before, parts = values(variables), []
        for part in _split(batch, case.micro_batches, size):
            # Each part starts from the same weights and statistics; seeds and counters go on.
            for variable, value, is_float in zip(variables, before, floats, strict=True):
                if is_float:
                    variable.assign(value)
            parts.append(self.part(part))
        finite = all(p["finite"] for p in parts)

        def mean(arrays):
            if arrays[0] is None:
                return None
            pairs = zip(parts, arrays, strict=True)
            return sum(p["size"] / size * np.asarray(a, "float64") for p, a in pairs)

        lasting = zip(*(p["variables"] for p in parts), strict=True)
        for variable, old, is_float, new in zip(variables, before, floats, lasting, strict=True):
            left = old if not finite else mean(new) if is_float else new[-1]
            variable.assign(np.asarray(left).astype(old.dtype))
        self.apply([mean(d) for d in zip(*(p["direction"] for p in parts), strict=True)], finite)
        self.report(batch, parts, mean([p["loss"] for p in parts]), size)

    def apply(self, direction, finite):
        optimizer, variables = self.model.optimizer, self.model.trainable_variables
        dynamic = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if not finite and not dynamic:
            return
        scale = self.scale() * (1.0 if finite else float("nan"))
        models.apply(
            self.model,
            [
                None if d is None else (scale * d).astype(v.dtype)
                for d, v in zip(direction, variables, strict=True)
            ],
        )

    def report(self, batch, parts, loss, size):
        model = self.model
        x, y, weight = models.tensors(batch)
        tracker = next(m for m in model.metrics if m.name == "loss")
        tracker.update_state(ops.convert_to_tensor(loss, "float32"), sample_weight=size)
        y_pred = keras.tree.map_structure(lambda *t: ops.concatenate(t), *(p["y_pred"] for p in parts))
        _carry_masks(model, x, y_pred)
        model.compute_metrics(x, y, y_pred, weight)
        self.seen += size
        for name in parts[0]["extra"]:
            value = sum(p["size"] * p["extra"][name] for p in parts)
            self.extra[name] = self.extra.get(name, 0.0) + value

    def scale(self):
        optimizer = self.model.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            return float(ops.convert_to_numpy(optimizer.scale_loss(1.0)))
        return 1.0

    def part(self, batch):
        """Loss, predictions, direction and state of one part of the batch."""
        model, case, scale = self.model, self.case, self.scale()
        variables = model.trainable_variables
        before, noise = values(model.non_trainable_variables), adapter.noise()

        def tensors():  # Anew: Keras writes into the weights of masked examples on PyTorch.
            return models.tensors(copy.deepcopy(batch))

        loss, y_pred, g = adapter.forward_and_gradient(model, tensors(), scale)
        after, noise_after = values(model.non_trainable_variables), adapter.noise()
        trackers = values(model.metrics_variables)
        start = values(variables)

        used = [i for i, t in enumerate(g) if t is not None]
        shapes = [tuple(variables[i].shape) for i in used]
        w = _join([ops.convert_to_tensor(start[i]) for i in used])
        g = _join([g[i] for i in used])
        seen = {}

        def weights_of(v):
            parts = adapter.split(v, shapes)
            return [ops.cast(t, variables[i].dtype) for i, t in zip(used, parts, strict=True)]

        def rewind():
            assign(model.non_trainable_variables, before)
            adapter.set_noise(noise)

        def gradient_at(v):
            rewind()
            assign([variables[i] for i in used], weights_of(v))
            seen["loss"], _, at = adapter.forward_and_gradient(model, tensors(), scale)
            assign(variables, start)
            seen["gradient"] = _join([at[i] for i in used])
            return seen["gradient"]

        def loss_at(v):
            mapping = list(zip((variables[i] for i in used), weights_of(v), strict=True))
            with _Scope(state_mapping=mapping, collect_losses=True):
                x, y, weight = tensors()
                out = model(x, training=True)
                return model.compute_loss(x=x, y=y, y_pred=out, sample_weight=weight)

        region = _Region(case, [variables[i] for i in used], w)

        def adversary(rho):
            """The gradient at the adversary."""
            if not case.second_order:
                return gradient_at(w + region.ascend(gradient_at, w, g, rho))
            rewind()
            inner = adapter.differentiable_gradient(loss_at)

            def adversarial_loss(v):
                return loss_at(v + region.ascend(inner, v, inner(v), rho))

            seen["gradient"] = adapter.gradient(adversarial_loss)(w)
            seen["loss"] = adversarial_loss(w)
            return seen["gradient"]

        direction = self.direction(adversary, g)
        assign(model.non_trainable_variables, after)
        assign(model.metrics_variables, trackers)
        adapter.set_noise(noise_after)

        finite = all(np.all(np.isfinite(ops.convert_to_numpy(t))) for t in (loss, g, direction, *seen.values()))
        whole = [None] * len(variables)
        for i, t in zip(used, adapter.split(direction, shapes), strict=True):
            whole[i] = ops.convert_to_numpy(t)
        return {
            "size": len(keras.tree.flatten(batch[0])[0]),
            "loss": float(ops.convert_to_numpy(loss)),
            "y_pred": y_pred,
            "direction": whole,
            "variables": [*start, *after],
            "finite": finite,
            "extra": self.extra_logs(loss, g, seen) if case.extra_logs else {},
        }

    def extra_logs(self, loss, g, seen):
        loss = float(ops.convert_to_numpy(loss))
        perturbed = float(ops.convert_to_numpy(seen.get("loss", loss)))
        g = np.asarray(ops.convert_to_numpy(g), "float64")
        g_adv = np.asarray(ops.convert_to_numpy(seen.get("gradient", g)), "float64")
        lengths = np.linalg.norm(g) * np.linalg.norm(g_adv)
        return {
            "perturbed_loss": perturbed,
            "sharpness": perturbed - loss,
            "grad_norm": np.linalg.norm(g),
            "grad_cosine": g @ g_adv / lengths if lengths else 0.0,
        }

    def direction(self, adversary, g):
        """The rule of the method: what stands in place of the gradient."""
        method = self.case.method
        if method is None:
            return g
        if method in ("sam", "asam"):
            return adversary(self.rho)
        if method == "bsam":
            down = adversary(-self.rho_min)
            up = adversary(self.rho)
            return up + g - _quotient(_norm(up), _norm(down)) * down
        g_adv = adversary(self.rho)  # gsam, adaptive_gsam
        parallel = _quotient(ops.sum(g * g_adv), ops.sum(g_adv * g_adv)) * g_adv
        return g_adv - 0.4 * (g - parallel)


class _Region:
    """Where the adversary may go, and how it climbs."""

    def __init__(self, case, variables, w):
        name = {"asam": "adaptive", "adaptive_gsam": "weight_scaled"}.get(case.method, case.neighborhood)
        self.name, self.steps = name, case.ascent_steps
        bias = [v.name in ("bias", "beta") or v.name.endswith("_bias") for v in variables]
        part = [_takes_part(case.perturb, v) for v in variables]
        sizes = [int(np.prod(v.shape)) for v in variables]
        dtype = keras.backend.standardize_dtype(w.dtype)
        self.bias, self.part = (
            ops.convert_to_tensor(np.repeat(flags, sizes).astype(dtype)) for flags in (bias, part)
        )
        self.p = {"ball_3": 3.0, "adaptive_3": 3.0, "ball_inf": np.inf}.get(name, 2.0)

    def scale(self, w):
        if self.name.startswith("adaptive"):
            return self.bias + (1.0 - self.bias) * (ops.abs(w) + 0.01)
        if self.name == "weight_scaled":
            return ops.abs(w) + 0.01
        return ops.ones_like(w)

    def climb(self, g, w, rho):
        g, scale = g * self.part, self.scale(w)
        if self.name == "unnormalized":
            return rho * g
        if self.name == "weight_scaled":
            return rho * scale * _over_norm(g)
        return rho * scale * _steepest(scale * g, self.p)

    def project(self, e, w, rho):
        if self.name == "unnormalized":
            return e
        scale = self.scale(w)
        if np.isinf(self.p):
            return scale * ops.minimum(ops.maximum(e / scale, -rho), rho)
        size = _p_norm(e / scale, self.p)
        return e * (rho / size) if float(ops.convert_to_numpy(size.detach() if BACKEND == "torch" else size)) > rho else e  # noqa: E501

    def ascend(self, gradient_at, w, g, rho):
        """The perturbation."""
        e = self.climb(g, w, rho)
        for _ in range(self.steps - 1):
            g = gradient_at(w + e)
            e = self.project(e + self.climb(g, w, rho), w, abs(rho))
        return e


def _steepest(g, p):
    """The vector of p-norm 1 along which a function with the gradient `g` rises most."""
    if p == 2.0:
        return _over_norm(g)
    if np.isinf(p):
        return ops.sign(g)
    q = p / (p - 1.0)
    size = ops.abs(g) + 1e-30
    return ops.sign(g) * size ** (q - 1.0) / ops.sum(size**q) ** (1.0 / p)


def _over_norm(g):
    return g / ops.sqrt(ops.sum(g * g) + 1e-30)


def _norm(t):
    return ops.sqrt(ops.sum(t * t))


def _p_norm(t, p):
    return ops.sqrt(ops.sum(t * t) + 1e-30) if p == 2.0 else ops.sum(ops.abs(t) ** p) ** (1.0 / p)


def _quotient(a, b):
    return a / b if float(ops.convert_to_numpy(b)) else 0.0 * a


def _takes_part(perturb, variable):
    """Whether a weight is perturbed, by what the documentation says."""
    in_norm = "norm" in variable.path.split("/")[-2]
    is_bias = variable.name == "bias" or variable.name.endswith("_bias")
    return {
        "all": True,
        "norm_only": in_norm,
        "no_bias_no_norm": not (in_norm or is_bias),
        "function": "bias" not in variable.name,
    }[perturb]


def _join(tensors):
    # Under a policy of float64, the weights of LoRA have float32.
    dtype = keras.backend.result_type(*(keras.backend.standardize_dtype(t.dtype) for t in tensors))
    return ops.concatenate([ops.reshape(ops.cast(t, dtype), (-1,)) for t in tensors])


def _split(batch, number, size):
    """The parts of a batch."""
    start = 0
    for i in range(min(number, size)):
        end = start + size // number + (i < size % number)
        yield keras.tree.map_structure(
            lambda a, s=start, e=end: None if a is None else a[s:e], batch
        )
        start = end


class _Scope(keras.StatelessScope):
    """A pass in which an assignment means what it means in plain training."""

    def add_update(self, update):
        variable, value = update
        trained = self.get_current_value(variable) if variable.trainable else None
        super().add_update((variable, adapter.assigned(value, trained)))


def _carry_masks(model, x, y_pred):
    """Give predictions the masks that an eager call finds."""
    before = values(model.non_trainable_variables)
    found = model(x, training=False)
    assign(model.non_trainable_variables, before)  # Recurrent dropout draws even then.
    for t, other in zip(keras.tree.flatten(y_pred), keras.tree.flatten(found), strict=True):
        mask = getattr(other, "_keras_mask", None)
        if mask is not None:
            t._keras_mask = mask
