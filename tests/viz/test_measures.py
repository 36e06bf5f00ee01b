"""Pictures of measures: what is drawn is what was given, without a display; refusals."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from xai_fast import metrics, viz
from xai_fast.viz import measures

pytest.importorskip("matplotlib")

POINTS = {"a": [(0.1, 0.9), (0.3, 0.7)], "b": [(0.5, 0.4), (0.8, 0.2)]}


def drawn(figure: Any) -> np.ndarray:
    """The picture as bytes: a figure that cannot be drawn fails here."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def texts(figure: Any) -> set[str]:
    found = {text.get_text() for axis in figure.axes for text in axis.texts}
    for legend in figure.legends:
        found |= {text.get_text() for text in legend.get_texts()}
    return found | {text.get_text() for text in figure.texts}


def test_needs_no_display_and_no_pyplot() -> None:
    code = (
        "import sys; from xai_fast import viz; assert 'matplotlib' not in sys.modules; "
        "viz.plot_fidelity({'a': [(0.1, 0.9)]}).savefig('/dev/null', format='png'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr


# ---- the plane of fidelities -----------------------------------------------------------------------------------------


def test_fidelity_has_a_line_for_each_method_and_the_best_corner() -> None:
    figure = viz.plot_fidelity(POINTS, levels=[0.5, 0.9], title="T")
    axis = figure.axes[0]
    for line, (name, points) in zip(axis.lines, POINTS.items(), strict=False):
        assert line.get_label() == name
        assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == points
    assert axis.lines[0].get_color() != axis.lines[1].get_color()
    assert axis.lines[0].get_marker() != axis.lines[1].get_marker()
    star = next(line for line in axis.lines if line.get_marker() == "*")
    assert (*star.get_xdata(), *star.get_ydata()) == (0, 1)
    assert {"a", "b", "0.5", "0.9", "best", "sparsity", "characterization score"} <= texts(figure)
    assert axis.get_title(loc="left") == "T"
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    for x, y in [p for points in POINTS.values() for p in points]:
        assert left < x < right
        assert bottom < y < top
    assert len(np.unique(drawn(figure).reshape(-1, 4), axis=0)) > 50


def test_contours_are_of_the_score() -> None:
    figure = viz.plot_fidelity({"a": [(0.0, 1.0), (1.0, 0.0)]})
    contours = next(c for c in figure.axes[0].collections if hasattr(c, "levels"))
    for level, path in zip(contours.levels, contours.get_paths(), strict=True):
        inside = path.vertices[(path.vertices >= 0).all(1) & (path.vertices <= 1).all(1)]
        score = metrics.characterization_score(torch.from_numpy(inside[:, 1]), torch.from_numpy(inside[:, 0]))
        assert len(inside) > 20
        assert (score - level).abs().max() < 0.01


def test_fidelity_far_from_the_corner_points_to_it() -> None:
    figure = viz.plot_fidelity({"a": [(0.6, 0.3)]}, limits=((0.5, 0.7), (0.2, 0.4)))
    assert "better" in texts(figure)
    assert "best" not in texts(figure)
    assert figure.axes[0].get_xlim() == (0.5, 0.7)
    drawn(figure)


def test_fidelity_takes_results_below_zero_and_single_points() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(8, 5), torch.randn(5, 3)
    results = {
        "input": metrics.fidelity(lambda x: x @ weight, x, x, form="probability"),
        "one": metrics.fidelity(lambda x: x @ weight, x, x, sparsity=0.5, form="probability"),
    }
    axis = viz.plot_fidelity(results).axes[0]
    assert np.allclose(axis.lines[0].get_ydata(), results["input"].fid_plus)
    assert np.allclose(axis.lines[0].get_xdata(), results["input"].fid_minus)
    assert len(axis.lines[1].get_xdata()) == 1
    drawn(viz.plot_fidelity({"a": [(-0.3, -0.2), (math.nan, math.nan)]}, levels=[0.1, 0.2]))
    drawn(viz.plot_fidelity({"a": [(math.nan, math.nan)]}))


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_by_sparsity_has_a_panel_for_each_measure_and_bands() -> None:
    curve = ([0.9, 0.5], [0.2, 0.8], [0.1, 0.05])
    curves = {"fid_plus_model_accuracy": {"a": curve, "b": ([0.5, 0.9], [0.3, 0.1], None)}, "gini": {"b": curve}}
    figure = viz.plot_by_sparsity(curves, better={"fid_plus_model_accuracy": "higher", "gini": "lower"}, title="T")
    first, second = (axis for axis in figure.axes if axis.axison)
    assert first.lines[0].get_xdata().tolist() == [0.5, 0.9]  # in order
    assert first.lines[0].get_ydata().tolist() == [0.8, 0.2]
    band = first.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(0.85)
    assert band[:, 1].min() == pytest.approx(0.1)
    assert len(first.collections) == 1  # b has no errors
    assert first.get_title(loc="left") == "fid+ model, accuracy ↑"
    assert second.get_title(loc="left") == "gini ↓"
    assert first.lines[1].get_color() == second.lines[0].get_color()  # b looks the same everywhere
    assert {"a", "b"} <= texts(figure)
    drawn(figure)
    drawn(viz.plot_by_sparsity({name: {"a": curve} for name in "vwxyz"}))


def test_names_stay_apart_and_near_their_lines() -> None:
    places = {"a": 0.5, "b": 0.5, "c": 0.51, "d": 0.9}
    found = measures._apart(places, 0.1)
    heights = sorted(found.values())
    assert min(np.diff(heights)) >= 0.1 - 1e-12
    assert found["d"] == 0.9
    assert found["a"] < found["b"] < found["c"]
    assert (found["a"] + found["b"] + found["c"]) / 3 == pytest.approx((0.5 + 0.5 + 0.51) / 3)


# ---- bars ------------------------------------------------------------------------------------------------------------


def test_bars_have_errors_and_name_the_best() -> None:
    values = {"a": {"gini": (0.7, 0.1), "size": 30.0}, "b": {"gini": (0.5, 0.2), "size": 20.0}, "c": {"gini": math.nan}}
    figure = viz.plot_bars(values, better={"gini": "higher", "size": "lower"})
    gini, size = (axis for axis in figure.axes if axis.axison)
    assert [bar.get_width() for bar in gini.patches] == [0.7, 0.5]
    assert gini.get_title(loc="left") == "gini ↑"
    assert size.get_title(loc="left") == "size ↓"
    bold = [{t.get_text() for t in axis.texts if t.get_fontweight() == "bold"} for axis in (gini, size)]
    assert bold == [{"0.7"}, {"20"}]
    segments = [c.get_segments()[0][:, 0].tolist() for c in gini.collections]
    assert np.allclose(segments, [[0.6, 0.8], [0.3, 0.7]])
    assert [t.get_text() for t in gini.texts].count(" no value") == 1
    assert [t.get_text() for t in gini.get_yticklabels()] == ["a", "b", "c"]
    drawn(figure)
    drawn(viz.plot_bars({"a": {"r": (-0.4, 0.1)}, "b": {"r": (0.2, math.nan)}}, title="below 0"))
    assert not any(t.get_fontweight() == "bold" for t in viz.plot_bars({"a": {"r": 1.0}}).axes[0].texts)


# ---- radar -----------------------------------------------------------------------------------------------------------


def test_radar_is_outward_where_better() -> None:
    values = {"a": {"up": 4.0, "down": 1.0, "bounded": 0.2}, "b": {"up": 2.0, "down": 4.0, "bounded": -0.5}}
    figure = viz.plot_radar(
        values, better={"up": "higher", "down": "lower", "bounded": "lower"}, limits={"bounded": (1.0, 0.0)}
    )
    a, b = (line.get_ydata().tolist() for line in figure.axes[0].lines)
    assert a == pytest.approx([1.0, 1.0, 0.8, 1.0])
    assert b == pytest.approx([0.5, 0.25, 1.0, 0.5])
    assert {"up *", "down *", "bounded", "a", "b", "outward is better;  * as a share of the best method"} <= texts(figure)
    drawn(figure)


def test_radar_leaves_gaps_and_out_what_nobody_has() -> None:
    values = {m: {"p": 1.0, "q": math.nan, "r": 0.0, "s": 0.5} for m in "ab"}
    values["b"]["s"] = math.nan
    figure = viz.plot_radar(values, better={"r": "lower"}, title="T")
    a, b = (line.get_ydata() for line in figure.axes[0].lines)
    assert a.tolist() == [1.0, 1.0, 1.0, 1.0]  # p, r, s and p again
    assert np.isnan(b).tolist() == [False, False, True, False]
    drawn(figure)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plot", "arguments", "options", "error", "message"),
    [
        ("fidelity", [], {}, TypeError, "points: expected a dict by name, or a study, got list"),
        ("fidelity", {}, {}, ValueError, "points: expected at least one entry, got none"),
        ("fidelity", {"a": [(1, 2, 3)]}, {}, ValueError, r"points: expected \(fid-, fid\+\) pairs for 'a'"),
        ("fidelity", POINTS, {"levels": [0.5]}, ValueError, "levels: expected one for each of the 2 points of 'a', got 1"),
        ("fidelity", POINTS, {"kind": "model"}, TypeError, "kind: expected only beside a study"),
        ("by_sparsity", {"m": {}}, {}, ValueError, r"curves\['m'\]: expected at least one entry"),
        (
            "by_sparsity",
            {"m": {"a": 3}},
            {},
            TypeError,
            r"curves\['m'\]\['a'\]: expected \(levels, values, errors\), got int",
        ),
        ("by_sparsity", {"m": {"a": ([1], [1, 2])}}, {}, ValueError, "expected levels, values and errors of one shape"),
        ("bars", {"a": {"m": "x"}}, {}, TypeError, r"values\['a'\]\['m'\]: expected a number or \(value, error\), got 'x'"),
        ("bars", {"a": {"m": 1}}, {"better": {"m": "up"}}, ValueError, "better: expected 'higher', 'lower' or None for 'm'"),
        ("radar", {"a": {"m": 1, "n": 2}}, {}, ValueError, "values: expected at least 3 measures with numbers .* got 2"),
        (
            "radar",
            {"a": {"m": 1, "n": 2, "o": 3}},
            {"limits": {"m": (1, 1)}},
            ValueError,
            "limits: expected two different values for 'm'",
        ),
    ],
)
def test_refusals(plot: str, arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(viz, f"plot_{plot}")(arguments, **options)
