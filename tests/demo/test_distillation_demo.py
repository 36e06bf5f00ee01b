"""The distillation page from the command line to the file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.demo.real import built_with, needs
from xai_fast.demo import main
from xai_fast.demo.distillation import demo as distillation_demo
from xai_fast.demo.distillation import diamonds
from xai_fast.demo.distillation import issues_page as distillation_issues_page
from xai_fast.demo.distillation import page as distillation_page
from xai_fast.demo.distillation import students as distilled
from xai_fast.demo.distillation.diamonds import FEATURES, LEVELS, Diamonds
from xai_fast.demo.distillation.issues import EXCHANGES, SIZE, middle
from xai_fast.demo.distillation.students import CUT, NETWORK, TREES, Effort
from xai_fast.viz import Report

for package in ("sklearn", "matplotlib", "jinja2", "tqdm", "rich"):
    pytest.importorskip(package)

IMAGE = re.compile(r'<img src="data:image/png;base64,[A-Za-z0-9+/]+=*"')
TINY = Effort(rows=1500, tests=400, epochs=2, trees=15, pairs=3, bins=(12, 5, 3), splits=1, budgets=(1, 2))


def _made_up(count: int = 2200) -> Diamonds:
    """Stones like those of the table: four columns that say the size, three ordered categories, and two wrong rows."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    x = 4 + 4 * draw(count) ** 2
    y = x * (0.99 + 0.02 * draw(count))
    depth = 59 + 5 * draw(count)
    z = depth / 200 * (x + y)
    carat = 0.0061 * x * y * z * (0.97 + 0.06 * draw(count))
    levels = [(len(LEVELS[name]) * draw(count)).floor() for name in ("cut", "color", "clarity")]
    table = 54 + 8 * draw(count)
    price = (1.9 * carat.log() + 0.05 * levels[0] + 0.1 * levels[1] + 0.12 * levels[2] + 8).exp()
    X = torch.stack([carat, *levels, depth, table, x, y, z], 1)
    X[0, 8], X[1, 8] = 0.0, 1.3 * X[1, 8]
    impossible, contradictory = (torch.arange(count) == k for k in (0, 1))
    return Diamonds(X, price, impossible, contradictory)


@pytest.fixture(scope="module")
def results() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation_demo, "load_diamonds", _made_up)

        class Bar:
            update = staticmethod(lambda: None)
            set_description = staticmethod(lambda text: None)

        return distillation_demo._results(TINY, torch.device("cpu"), Bar())


# ---- the page -------------------------------------------------------------------------------------------------------------


def test_smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the real diamonds: the price is nearly a sum, the cut is less of one, and the sizes cannot be told apart."""
    needs(diamonds.load_diamonds)
    built = built_with(monkeypatch, distillation_demo, "build_distillation_page")
    out, picture = tmp_path / "deep" / "index.html", tmp_path / "distillation.png"
    arguments = ["--smallest", "--pages", "distillation", "--out", str(out), "--distillation-picture", str(picture)]
    assert main(arguments) == 0
    ((found, _),) = built
    assert len(found.split.diamonds.X) == 53_940
    assert int(found.split.diamonds.impossible.sum()) == 23
    assert int(found.split.diamonds.contradictory.sum()) == 24
    for name in (NETWORK, TREES):
        d = found.distilled[name]
        assert d.own["teacher"] > d.own["plain"]
        assert d.fidelity.by_order[0].r2 > 0.99
        assert d.fidelity.r2 > d.fidelity.by_order[0].r2
        assert d.fidelity.rows == len(d.held) == 2000
        x = next(e for e in found.issues.exchanges[name] if e.title == "x")
        assert x.r2["student"] < d.fidelity.r2 - 0.005
        again = found.issues.refits[name]
        sizes = [FEATURES.index(f) for f in SIZE]
        assert again.sum_spread < float(again.spread[sizes].max())
        assert float(again.spread[sizes].min()) > float(again.spread[[2, 3]].max())
    cut = found.distilled[CUT]
    assert cut.own["plain"] < cut.own["student"] < cut.own["teacher"]
    assert cut.fidelity.kl < cut.fidelity.by_order[0].kl
    assert 0.5 < cut.fidelity.agreement < 1
    html = out.with_name("distillation.html").read_text()
    assert not out.exists()
    for name, d in found.distilled.items():
        for order in d.fidelity.by_order:
            assert f"<td>{distillation_page._with_error(order.r2, order.r2_error)}</td>" in html
            assert distillation_issues_page.percent(1 - order.r2, 2) in html
        assert name in html
    assert len(IMAGE.findall(html)) >= 14
    assert "Left out" not in html
    assert "nan" not in re.sub(r'src="[^"]*"', "", html)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_missing_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def load_diamonds() -> Diamonds:
        raise diamonds.DataUnavailable("the diamonds cannot be had: no net")

    monkeypatch.setattr(distillation_demo, "load_diamonds", load_diamonds)
    arguments = ["--smallest", "--pages", "distillation", "--out", str(tmp_path / "index.html")]
    assert main(arguments) == 0
    html = (tmp_path / "distillation.html").read_text()
    assert "Left out: the diamonds cannot be had: no net." in html
    assert "Limits of such students" in html
    assert "Left out, diamonds" in capsys.readouterr().err
    assert main([*arguments, "--distillation-picture", str(tmp_path / "a.png")]) == 1
    assert "xai_fast demo: distillation picture: left out, the diamonds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "distillation.html"], "out: expected another name than distillation.html"),
        (["--pages", "rollout", "--distillation-picture", "a.png"], "distillation_picture: expected the page"),
    ],
)
def test_contradictions(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert f"xai_fast demo: {message}" in capsys.readouterr().err


def test_page_says_what_was_measured(results: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(Report, "figures", lambda self, figures, **options: (drawn.extend(figures), self)[1])
    text = distillation_page.build_distillation_page(results, []).html()
    triples = bool(results.distilled[NETWORK].chosen(3))
    # Main effects, pairs, perhaps a triple, two of the cut; three screenings; three of the twin; budgets; plane; refits.
    assert len(drawn) == 4 + triples + 3 + 3 + 1 + 1 + 2
    for name, d in results.distilled.items():
        own = "".join(f"<td>{d.own[k]:.3f}</td>" for k in ("plain", "teacher", "main effects", "student"))
        assert own in re.sub(r"\n\s*", "", text)
        assert f"{100 * d.fidelity.residual_share:.2f}\u00a0% ({name})" in text
    network = results.distilled[NETWORK]
    for pair in network.chosen(2):
        names = distillation_issues_page.TIMES.join(FEATURES[f] for f in pair)
        assert f"{names} ({100 * float(network.gains[pair[0], pair[1]]):.1f}\u00a0%)" in text
    assert f"<td>{results.issues.refits[TREES].sum_spread:.4f}</td>" in text
    assert "nan" not in text


def test_sentences_turn_with_the_numbers(results: Any) -> None:
    network = results.distilled[NETWORK]
    refits = results.issues.refits[NETWORK]
    sentence = distillation_issues_page._refits_sentence
    assert "trade with each other" in sentence(refits, network)
    assert "trade with each other" not in sentence(replace(refits, sum_spread=1.0), network)
    assert "Each of the four sizes moves more" not in sentence(replace(refits, spread=torch.ones(9)), network)
    own = {"plain": 0.1, "teacher": 0.9, "main effects": 0.8, "student": 0.9}
    assert "as good as its teacher" in distillation_page._own_sentence({"A": replace(network, own=own)})
    worse = {"A": replace(network, own=own | {"student": 0.85})}
    assert distillation_page._own_sentence(worse) == "It loses 5.0 points (A)."
    explosion = results.issues.explosion[NETWORK]
    flat = replace(explosion, r2=dict.fromkeys(explosion.r2, 0.9))
    assert "bring nothing" in distillation_issues_page._explosion_sentence("A", flat, network)
    exchanges = results.issues.exchanges[NETWORK]
    same = [replace(exchanges[0], title=e.title) for e in exchanges]
    calm = distillation_issues_page._extrapolation_sentence("A", same, network)
    assert "next to nothing" in calm
    assert "part from its teacher" not in calm
    worse_r2 = [replace(e, r2={"main effects": 0.9, "student": 0.8}) for e in same]
    assert "lower R2" in distillation_issues_page._extrapolation_sentence("A", worse_r2, network)


def test_shape_that_falls_is_named(results: Any) -> None:
    network = results.distilled[NETWORK]
    assert 0 <= distillation_page._falling(network, "x") <= 1
    terms = list(network.gam.terms)
    place = [t.features for t in terms].index((6,))
    terms[place] = replace(terms[place], values=-torch.arange(len(terms[place].values)).double())
    turned = replace(network, gam=replace(network.gam, terms=tuple(terms)))
    assert distillation_page._falling(turned, "x") == 1
    assert "The shape of x falls over 100\u00a0% of the diamonds" in distillation_page._strongest(turned)


# ---- what was measured ----------------------------------------------------------------------------------------------------


def test_fidelity_is_of_rows_that_nobody_saw(results: Any) -> None:
    split = results.split
    assert len(split.X) == TINY.rows
    assert len(split.held) == TINY.tests
    assert not (set(map(tuple, split.X.tolist())) & set(map(tuple, split.held.tolist())))
    assert split.twins == 0
    again = replace(split, held=split.X[:5], truth=split.y[:5])
    assert again.twins == 5
    wrong = set(map(tuple, split.diamonds.X[split.diamonds.wrong].tolist()))
    assert not (wrong & set(map(tuple, torch.cat([split.X, split.held]).tolist())))
    for d in results.distilled.values():
        said = distilled.answers(d.teacher, d.held).reshape(len(d.held), -1)
        f = d.gam.predict(d.held).reshape(len(said), -1)
        r2 = float(1 - ((f - said) ** 2).sum() / ((said - said.mean(0)) ** 2).sum())
        assert d.fidelity.r2 == pytest.approx(r2, abs=1e-6)


def test_twin_is_the_same_function(results: Any) -> None:
    twin = results.issues.twin
    assert twin.predictions < 1e-10
    assert twin.restored < 1e-9
    assert twin.shapes > 0.01
    pure, moved, back = twin.importances()[twin.pair]
    assert moved > pure
    assert back == pytest.approx(pure)
    before, inside, _ = twin.importances()[(twin.pair[0],)]
    assert inside < before


def test_exchanges(results: Any) -> None:
    for exchanges in results.issues.exchanges.values():
        assert [e.title for e in exchanges] == [title for title, _ in EXCHANGES] + ["impossible", "contradictory"]
        known = {e.title: e for e in exchanges}
        assert known["none"].gap["student"] < known["x"].gap["student"]
        assert known["none"].r2["student"] > known["every column for itself"].r2["student"]
        assert known["impossible"].rows == known["contradictory"].rows == 1
        assert known["impossible"].supported["student"] == 0


def test_plane_parts_where_there_are_no_data(results: Any) -> None:
    plane = results.issues.plane
    assert plane.teacher.shape == plane.student.shape == (len(plane.carat), len(plane.x))
    assert plane.near < plane.far


def test_refits_are_of_halves(results: Any) -> None:
    for refits in results.issues.refits.values():
        assert len(refits.students) == len(refits.r2) == 2 * TINY.splits
        assert not torch.equal(refits.students[0].terms[0].values, refits.students[1].terms[0].values)
        assert sum(refits.picked.values()) == sum(t.order == 2 for g in refits.students for t in g.terms)


def test_budgets(results: Any) -> None:
    for explosion in results.issues.explosion.values():
        assert list(explosion.r2) == [0, *TINY.budgets]
        assert explosion.values[0] < explosion.values[1] < explosion.values[2]


def test_middle_and_errors() -> None:
    assert middle(torch.arange(1001.0), 0.1) == (100.0, 900.0)
    assert distillation_page._with_error(0.99361, 0.00003) == "0.99361 ± 0.00003"
    assert distillation_page._with_error(0.5, 0.0) == "0.500 ± 0.000"


# ---- data -----------------------------------------------------------------------------------------------------------------

HEAD = '"","carat","cut","color","clarity","depth","table","price","x","y","z"\n'


def test_wrong_rows_are_found() -> None:
    text = HEAD + (
        '"1",0.23,"Ideal","E","SI2",61.5,55,326,3.95,3.98,2.43\n'
        '"2",2,"Premium","H","SI2",58.9,57,12210,8.09,58.9,8.06\n'
        '"3",1,"Fair","D","IF",43,59,3634,6.32,6.27,3.97\n'
        '"4",1,"Good","J","I1",60,59,3634,6.3,6.3,0\n'
    )
    found = diamonds.read_diamonds(text)
    assert found.impossible.tolist() == [False, True, False, True]
    assert found.contradictory.tolist() == [False, False, True, False]
    assert found.X[2, 1:4].tolist() == [0, 6, 7]
    assert found.price.tolist() == [326, 12210, 3634, 3634]


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", HEAD + '"1",0.2,"Superb","E","SI2",61.5,55,326,3.95,3.98,2.43\n', HEAD + '"1",0.2\n']
)
def test_another_table_is_refused(text: str) -> None:
    with pytest.raises(diamonds.DataUnavailable, match="not the table that was expected"):
        diamonds.read_diamonds(text)
