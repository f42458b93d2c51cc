"""Plain training: no adversary."""

import keras

from keras_sharp.methods.method import Method


@keras.saving.register_keras_serializable(package="keras_sharp")
class Plain(Method):
    """The base optimizer alone, for the part of training without an adversary.

    ```
    direction = g
    ```

    This is what `method=None` stands for. It is not in the table of methods,
    since the promises about the adversary are not its own. Costs one gradient
    per step.

    Example:

    >>> type(keras_sharp.methods.get(None)).__name__
    'Plain'
    """

    def __init__(self):
        super().__init__()

    def direction(self, objective, w, g):
        return g

    def get_config(self):
        return {}
