"""The products that an estimate takes: with which matrix, how many, and how far it has come."""

import time

import keras
import numpy as np

from keras_sharp.curvature.operators import HessianOperator

#: After how many seconds `verbose="auto"` shows progress.
LONG = 5.0


class Products:
    """An operator whose products are counted, and shown while they take long.

    Args:
        model: what an estimate was asked for: a model, or an operator.
        data: the triple `(x, y, sample_weight)`; all `None` for an operator.
        options: dictionary of the arguments of `HessianOperator`, for a model.
        expected: Integer, how many products there will be, or fewer.
        verbose: 0, 1 or `"auto"`: whether progress is shown: never, always,
            or when it takes longer than five seconds.
    """

    def __init__(self, model, data, options, expected, verbose):
        if verbose not in (0, 1, "auto"):
            raise ValueError(f"`verbose` must be 0, 1 or 'auto'. Received: verbose={verbose!r}")
        if not hasattr(model, "matvec"):
            model = HessianOperator(model, *data, **options)
        elif options or any(part is not None for part in data):
            raise ValueError(
                "An operator has its data and options already. Received: a "
                f"{type(model).__name__}, and data or options {sorted(options)} as well. Pass the "
                "operator alone, or a model and its data."
            )
        #: The operator itself, whose products are not counted.
        self.source = model
        self.size = model.size
        self.dtype = np.dtype(getattr(model, "dtype", "float64"))
        #: How many products have been taken.
        self.count = 0
        self._bar = keras.utils.Progbar(expected, unit_name="product")
        self._verbose = verbose
        self._shown = False
        self._start = time.monotonic()

    def matvec(self, v):
        """The product with a vector."""
        result = self.source.matvec(v)
        self.count += 1
        late = time.monotonic() - self._start > LONG
        if self._verbose == 1 or (self._verbose == "auto" and late):
            self._shown = True
            self._bar.update(self.count, finalize=False)
        return result

    def expect(self, products):
        """Say anew how many products there will be, or fewer."""
        self._bar.target = products

    def certified(self, result):
        """A result, with the certificate of the operator as its attribute `certificate`."""
        result.certificate = getattr(self.source, "certificate", None)
        return result

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._shown:
            self._bar.update(self.count, finalize=True)
