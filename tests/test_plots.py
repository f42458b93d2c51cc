"""Pictures: that they show what they were given. How they look, a person has to see."""

import sys

import keras
import numpy as np
import pytest

from keras_sharp import RhoRange, plots
from keras_sharp.curvature import PerLayer, SpectralDensity
from keras_sharp.landscape import Line, PathPlane, Plane

plt = pytest.importorskip("matplotlib.pyplot")

LOGS = {"loss": [1.0, 0.5], "val_loss": [1.1, 0.7], "accuracy": [0.5, 0.6], "rho": [0.1, 0.1]}
HESSIAN = {
    "epoch": [0, 4],
    "hessian_lambda_1": [9.0, 7.0],
    "hessian_lambda_2": [4.0, 5.0],
    "hessian_ratio": [2.25, 1.4],
}
DENSITY = SpectralDensity(np.array([-1.0, 0.0, 9.0]), np.array([0.1, 0.8, 0.1]), 3)
LINE = Line(np.array([-1.0, 0.0, 1.0]), np.array([4.0, 1.0, 3.0]))
PLANE = Plane(np.array([-1.0, 0.0]), np.array([0.0, 1.0]), np.array([[1.0, 2.0], [3.0, 4.0]]))


LAYERS = PerLayer(
    *(("first", "last"), np.array([6, 3]), np.array([2.0, 4.0]), np.array([0.1, 0.2])),
    *(np.array([3.0, -1.0]), np.array([0.3, 0.1]), 130),
)


@pytest.fixture(autouse=True)
def _without_a_screen():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def drawn(panel):
    """The curves of a panel, by their labels."""
    return {line.get_label(): line.get_xydata().tolist() for line in panel.get_lines()}


def test_training_curves_show_all_logs_with_the_validation_dashed():
    figure = plots.training_curves({"sgd": LOGS, "sam": {"loss": [3.0]}})
    assert [panel.get_ylabel() for panel in figure.axes] == ["loss", "accuracy", "rho"]
    assert drawn(figure.axes[0]) == {
        "sgd": [[1, 1.0], [2, 0.5]],
        "sgd, validation": [[1, 1.1], [2, 0.7]],
        "sam": [[1, 3.0]],
    }
    assert [line.get_linestyle() for line in figure.axes[0].get_lines()] == ["-", "--", "-"]
    assert {panel.get_xlabel() for panel in figure.axes} == {"epoch"}


def test_training_curves_of_one_training():
    history = keras.callbacks.History()
    history.history = LOGS
    for given in (LOGS, history):
        figure = plots.training_curves(given, keys=["val_loss"])
        assert drawn(figure.axes[0]) == {"val_loss": [[1, 1.1], [2, 0.7]]}
        assert figure.axes[0].get_legend() is None  # The label of the axis says it.


def test_curves_stand_over_their_epochs_where_these_are_known():
    """Of a training that went on from epoch 3; of a probe that looked at some epochs only."""
    history = keras.callbacks.History()
    history.epoch, history.history = [3, 4], {"loss": [2.0, 1.0], "now_and_then": np.array([5.0])}
    figure = plots.training_curves({"sgd": history})
    assert drawn(figure.axes[0]) == {"sgd": [[4, 2.0], [5, 1.0]]}
    assert drawn(figure.axes[1]) == {"sgd": [[1, 5.0]]}
    figure = plots.training_curves({"epoch": [0, 5], "max_sharpness": np.array([2.0, 1.0])})
    assert [panel.get_ylabel() for panel in figure.axes] == ["max_sharpness"]
    assert drawn(figure.axes[0]) == {"max_sharpness": [[1, 2.0], [6, 1.0]]}


@pytest.mark.parametrize("recommended", [0.1, 0.0])
def test_a_range_of_rho_with_plain_training_dashed(recommended):
    rows = np.arange(21.0).reshape(7, 3) / 10  # rho is 0.0, 0.1, 0.2
    found = RhoRange(*rows, initial_val_loss=2.0, recommended=recommended)
    left, middle, right, cosine = plots.rho_range(found).axes
    assert drawn(left)["validation loss"] == [[0.1, 0.4], [0.2, 0.5]]
    assert drawn(left)["training loss"] == [[0.1, 0.7], [0.2, 0.8]]
    for panel in (left, middle):
        assert "dashed: no adversary" in [t.get_text() for t in panel.get_legend().get_texts()]
    assert drawn(middle)["sharpness"] == [[0.1, 1.0], [0.2, 1.1]]
    assert drawn(right)["rise of the loss"] == [[0.1, 1.3], [0.2, 1.4]]
    assert drawn(right)["if it were linear"] == [[0.1, 1.6], [0.2, 1.7]]
    (line,) = cosine.get_lines()
    assert np.transpose(line.get_data()).tolist() == [[0.1, 1.9], [0.2, 2.0]]
    dashed = [line.get_ydata() for line in left.get_lines() if line.get_linestyle() == "--"]
    assert [values[0] for values in dashed if len(values)] == [0.3, 0.6]
    vertical = [
        line.get_xdata()[0]
        for line in left.get_lines()
        if line.get_color() == "black" and line.get_linestyle() == "-"
    ]
    assert vertical == ([0.1] if recommended else [])
    assert f"rho = {recommended:.3g}" in left.get_title()


def test_the_history_of_eigenvalues():
    figure = plots.eigenvalue_history(HESSIAN)
    assert drawn(figure.axes[0]) == {
        r"$\lambda_{1}$": [[1, 9.0], [5, 7.0]],
        r"$\lambda_{2}$": [[1, 4.0], [5, 5.0]],
    }
    assert figure.axes[1].get_ylabel() == r"ratio $\lambda_1 / \lambda_{2}$"
    figure = plots.eigenvalue_history({"sgd": HESSIAN, "sam": HESSIAN})
    assert drawn(figure.axes[0])["sam"] == [[1, 9.0], [5, 7.0]]
    assert drawn(figure.axes[1])["sgd"] == [[1, 2.25], [5, 1.4]]


def test_densities_lie_over_each_other_on_a_logarithmic_scale():
    figure = plots.spectral_density({"sgd": DENSITY, "sam": DENSITY}, sigma=0.1)
    (panel,) = figure.axes
    assert panel.get_yscale() == "log"
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["sgd", "sam"]
    grid, values = np.array(drawn(panel)["sgd"]).T
    np.testing.assert_allclose(values, DENSITY.density(grid, 0.1))
    assert np.trapezoid(values, grid) == pytest.approx(1, rel=1e-3)
    low, high = panel.get_ylim()
    assert low < 0.1 / 0.1 / np.sqrt(2 * np.pi)
    assert high > values.max()
    assert len(plots.spectral_density(DENSITY).axes) == 1


def bars(panel):
    """The lengths of the bars of a panel, from the top to the bottom."""
    found = sorted(panel.patches, key=lambda bar: -bar.get_window_extent().y0)
    return [bar.get_width() for bar in found]


def test_layers_have_bars_side_by_side():
    left, right = plots.per_layer(LAYERS).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["first", "last"]
    assert bars(left) == [2, 4]
    assert bars(right) == [3, -1]
    assert left.get_legend() is None
    other = LAYERS._replace(names=("last", "more"), lambda_max=np.array([5.0, 6.0]))
    left, right = plots.per_layer({"sgd": LAYERS, "sam": other}).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["first", "last", "more"]
    assert bars(left) == [2, 4, 5, 6]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["sgd", "sam"]


def test_a_line_and_lines():
    (panel,) = plots.landscape(LINE).axes
    assert [line.get_xydata().tolist() for line in panel.get_lines()] == [[[-1, 4], [0, 1], [1, 3]]]
    assert panel.get_yscale() == "log"
    (panel,) = plots.landscape({"sgd": LINE, "sam": Line(LINE[0], -LINE[1])}).axes
    assert set(drawn(panel)) == {"sgd", "sam"}
    assert panel.get_yscale() == "linear"


def test_planes_stand_side_by_side_with_a_common_scale():
    figure = plots.landscape({"sgd": PLANE, "sam": PLANE._replace(losses=PLANE.losses * 10)})
    *panels, bar = figure.axes
    assert [panel.get_title() for panel in panels] == ["sgd", "sam"]
    assert bar.get_ylabel() == "loss"
    limits = {panel.collections[0].get_clim() for panel in panels}
    assert limits == {(1.0, 40.0)}
    # Matplotlib has the first axis upwards; here it is the first direction.
    assert panels[0].get_xlim() == (-1, 0)
    assert panels[0].get_ylim() == (0, 1)
    holes = PLANE._replace(losses=np.array([[1.0, np.nan], [np.inf, 4.0]]))
    assert len(plots.landscape(holes, log=False).axes) == 2


def test_paths_lie_in_their_plane_from_a_circle_to_a_star():
    paths = {"sgd": np.array([[-1.0, 0.0], [-0.5, 1.0], [0.0, 0.0]]), "sam": np.zeros((2, 2))}
    plane = PathPlane(*PLANE, paths, np.array([0.831, 0.1]))
    panel, _ = plots.landscape(plane).axes
    assert drawn(panel)["sgd"] == paths["sgd"].tolist()
    markers = {line.get_marker(): line.get_xydata().tolist() for line in panel.get_lines()[:3]}
    assert markers == {".": paths["sgd"].tolist(), "o": [[-1, 0]], "*": [[0, 0]]}
    assert panel.get_xlabel() == "first direction, 83% of the variance"
    assert panel.get_ylabel() == "second direction, 10% of the variance"
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["sgd", "sam"]
    alone = plane._replace(paths={"path": paths["sgd"]})
    left, right, _ = plots.landscape({"one": alone, "other": PLANE}).axes
    assert left.get_legend() is None
    assert [line.get_marker() for line in right.get_lines()] == ["+"]


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(
        ValueError, match=r"no logs to draw.*\['losss'\].*Expected some of \['loss'"
    ):
        plots.training_curves(LOGS, keys=["losss"])
    for nothing in ({}, {"sgd": {}}):
        with pytest.raises(ValueError, match="to draw"):
            plots.training_curves(nothing)
    with pytest.raises(ValueError, match="no eigenvalues to draw"):
        plots.eigenvalue_history({"epoch": [], "hessian_lambda_1": []})
    with pytest.raises(ValueError, match="no eigenvalues to draw"):
        plots.eigenvalue_history({"sgd": LOGS})
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.per_layer({})
    with pytest.raises(ValueError, match="Lines and planes are drawn apart"):
        plots.landscape({"a": LINE, "b": PLANE})
    with pytest.raises(ValueError, match="no loss in these slices is finite"):
        plots.landscape(LINE._replace(losses=np.full(3, np.nan)))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.training_curves(LOGS),
        lambda: plots.eigenvalue_history(HESSIAN),
        lambda: plots.spectral_density(DENSITY),
        lambda: plots.landscape(LINE),
        lambda: plots.per_layer(LAYERS),
    ],
)
def test_without_matplotlib_the_error_says_what_to_install(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install keras-sharp\[plots\]"):
        draw()
