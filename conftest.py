"""What the doctests of the package need; the tests have a conftest of their own."""

import keras
import numpy as np
import pytest

import keras_sharp

# The engines of the other backends would import these, and fail where they
# are not installed.
collect_ignore_glob = [
    f"keras_sharp/engine/_{backend}*.py"
    for backend in ("tensorflow", "jax", "torch")
    if backend != keras.backend.backend()
]


@pytest.fixture(autouse=True, scope="session")
def _names_of_doctests(doctest_namespace):
    """The names that an example in a docstring uses without importing them."""
    doctest_namespace.update(np=np, keras=keras, ops=keras.ops, keras_sharp=keras_sharp)
