"""What can be wrong with an additive student, on the distillation page; and the words that both its parts use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xai_fast.viz import Report

from .figures import explosion_figure, pair_figure, plane_figure, refits_figure, twin_figure
from .issues import SIZE, Exchange, Explosion, Plane, Refits, Twin
from .students import NETWORK, Distilled, Effort

__all__ = ["TIMES", "IssueResults", "add_issues", "count_of", "listed", "percent"]

# What is exchanged, in words.
EXCHANGED = {
    "none": "the test rows as they are",
    "color": "color of another diamond",
    "carat": "carat of another diamond",
    "x": "x of another diamond",
    "every column for itself": "every column of another diamond",
    "impossible": "real rows with impossible sides",
    "contradictory": "real rows that contradict themselves",
}
# A difference of log prices above which R2 or the gap counts as another one.
CLEAR = 1.2
# Between the features of a term: one of them is called x.
TIMES = " \N{MULTIPLICATION SIGN} "


@dataclass(frozen=True)
class IssueResults:
    """What the issues were shown on.

    Attributes
    ----------
    twin : Twin
    explosion : dict of str to Explosion
        By the name of the teacher; the others likewise.
    exchanges : dict of str to list of Exchange
    plane : Plane
    refits : dict of str to Refits
    """

    twin: Twin
    explosion: dict[str, Explosion]
    exchanges: dict[str, list[Exchange]]
    plane: Plane
    refits: dict[str, Refits]


def add_issues(report: Report, issues: IssueResults, distilled: dict[str, Distilled], effort: Effort) -> None:
    """Four sections, one for each issue."""
    _add_identifiability(report, issues.twin, distilled[NETWORK])
    _add_explosion(report, issues.explosion, distilled, effort)
    _add_extrapolation(report, issues, distilled)
    _add_correlation(report, issues.refits, distilled)


# ---- identifiability ------------------------------------------------------------------------------------------------------


def _add_identifiability(report: Report, twin: Twin, d: Distilled) -> None:
    gam, names = twin.before, d.features
    i, j = (names[f] for f in twin.pair)
    report.section("Issue 1: identifiability")
    report.paragraph(
        "A pair can say whatever its main effects say, so the same function can be written with other shapes: "
        f"{gam.report().free_directions} independent changes of the tables of this student leave every prediction as "
        f"it is. Here the pair {i}{TIMES}{j} took over what its grid can say of both main effects. The predictions "
        f"differ by at most {twin.predictions:.0e}, the shapes by up to {twin.shapes:.2f} in the log price. Who "
        f"draws the second one reports another importance for {i}."
    )
    rows = []
    for features, values in twin.importances().items():
        rows.append((TIMES.join(names[f] for f in features), *(f"{v:.3f}" for v in values)))
    report.table(("Importance", "pure", "the same function", "purified again"), rows)
    caption = "Blue: as fitted. Orange: the same function with the main effects inside the pair. Dotted: that one, purified."
    report.figures([(twin_figure(twin), "Main effects", caption)], cell=760)
    report.figures(
        [
            (pair_figure(twin.before, twin.pair, "pure"), f"{i}{TIMES}{j}", "The pair as it was fitted."),
            (pair_figure(twin.after, twin.pair, "the same function"), f"{i}{TIMES}{j}", "With both main effects inside."),
        ],
        cell=420,
    )
    moved = twin.back.moved.get(2, 0.0)
    report.paragraph(
        "Purification (functional ANOVA with the weights of the data: Hooker 2007; Lengerich et al. 2020) takes out "
        f"of every pair what belongs to one feature. purify() moved {percent(moved, 1)} of the variance and gave the "
        f"first shapes back to within {twin.restored:.0e}. fit_gam solves for pure terms from the start. What is "
        "pure depends on the weights: on other rows the same function has other shapes."
    )


# ---- explosion ------------------------------------------------------------------------------------------------------------


def _add_explosion(report: Report, found: dict[str, Explosion], distilled: dict[str, Distilled], effort: Effort) -> None:
    network = distilled[NETWORK]
    count = len(network.features)
    report.section("Issue 2: explosion of interactions")
    rows = []
    for order, name in enumerate(("main effects", "pairs", "triples"), 1):
        possible = math.comb(count, order)
        rows.append(
            (
                name,
                f"{possible:,}",
                str(len(network.chosen(order))),
                f"{possible * effort.bins[order - 1] ** order:,}",
                f"{math.comb(100, order):,}",
                f"{math.comb(100, order) * effort.bins[order - 1] ** order:,}",
            )
        )
    header = ("", "possible", "fitted", "values of all, at most", "possible of 100 features", "values of all, at most")
    report.table(header, rows, caption=f"{NETWORK}, {count} features")
    report.figures(
        [(explosion_figure(found), "", "On the test rows, by the budget of pairs, without triples. Logarithmic.")], cell=560
    )
    report.paragraph(" ".join(_explosion_sentence(name, e, distilled[name]) for name, e in found.items()))


def _explosion_sentence(name: str, explosion: Explosion, d: Distilled) -> str:
    """Half of what pairs bring, and what the last step of the budget brings."""
    counts = list(explosion.r2)
    first, last = explosion.r2[counts[0]], explosion.r2[counts[-1]]
    if last <= first:
        return f"{name}: pairs bring nothing on the test rows."
    enough = next(k for k in counts if explosion.r2[k] - first >= 0.5 * (last - first))
    step = explosion.r2[counts[-1]] - explosion.r2[counts[-2]]
    text = (
        f"{name}: of what {count_of(counts[-1], 'pair')} bring, half comes with the first "
        f"{'pair' if enough == 1 else f'{enough} pairs'}; from {counts[-2]} to {counts[-1]} they explain "
        f"{_points(step)} more"
    )
    order = d.fidelity.by_order
    if d.chosen(3):
        text += (
            f". {count_of(len(d.chosen(3)), 'triple').capitalize()} on top of {count_of(len(d.chosen(2)), 'pair')} "
            f"explain {_points(order[-1].r2 - order[-2].r2)} more"
        )
    return text + "."


def _points(share: float) -> str:
    return f"{100 * share:.3f} percent points".replace("-", "\N{MINUS SIGN}")


# ---- extrapolation --------------------------------------------------------------------------------------------------------


def _add_extrapolation(report: Report, issues: IssueResults, distilled: dict[str, Distilled]) -> None:
    report.section("Issue 3: extrapolation")
    report.paragraph(
        "Fidelity is fidelity on the data. Below, columns of the test rows are exchanged between diamonds, one at a "
        "time or each for itself, so that every value is one of the data but the row is not; then come the real "
        "rows that were kept aside because they are wrong. The student knows nothing of such rows, and neither does "
        "the teacher: that they part says that at least one of them makes its answer up."
    )
    for name, exchanges in issues.exchanges.items():
        rows = [_exchange_row(e) for e in exchanges]
        header = ("", "rows", "R2, main effects", "R2, student", "gap, main effects", "gap, student", "supported")
        report.table(header, rows, caption=name)
    report.paragraph(
        "R2 and gap (the median difference of the price) of student and teacher. Supported: the share of the rows "
        "that GAM.support takes for rows of the data."
    )
    for name, exchanges in issues.exchanges.items():
        report.paragraph(_extrapolation_sentence(name, exchanges, distilled[name]))
    plane = issues.plane
    report.figures(
        [
            (
                plane_figure(plane),
                f"{NETWORK}: the median diamond with every carat and every size",
                f"Dots: test rows. Typical difference where there are training rows {percent(plane.near, 1)}, where "
                f"there are none {percent(plane.far, 1)}.",
            )
        ],
        cell=900,
    )


def _exchange_row(e: Exchange) -> tuple[str, ...]:
    return (
        EXCHANGED[e.title],
        f"{e.rows:,}",
        *(f"{e.r2[k]:.4f}".replace("-", "\N{MINUS SIGN}") for k in ("main effects", "student")),
        *(percent(e.gap[k], 1) for k in ("main effects", "student")),
        percent(e.supported["student"], 2),
    )


def _extrapolation_sentence(name: str, exchanges: Sequence[Exchange], d: Distilled) -> str:
    known = {e.title: e for e in exchanges}
    base, color, x = known["none"], known["color"], known["x"]
    worse = [e for e in (color, x) if e.gap["student"] > CLEAR * base.gap["student"]]
    text = f"{name}: "
    if color not in worse:
        text += "a color of another diamond costs next to nothing, since color hardly depends on the rest. "
    if x in worse:
        text += (
            f"An x of another diamond makes the student part from its teacher by {percent(x.gap['student'], 1)} of "
            f"the price instead of {percent(base.gap['student'], 1)}, and support() takes "
            f"{percent(x.supported['student'], 2)} of these rows for rows of the data: "
        )
        text += _why_supported(d)
    moved = [e for e in exchanges if e.title not in ("none", "impossible", "contradictory")]
    lost = [EXCHANGED[e.title] for e in moved if e.r2["student"] < e.r2["main effects"]]
    if lost:
        text += (
            f"There more terms are no help: with {listed(lost)} the whole student has a lower R2 than main effects alone. "
        )
    bad, off = known["impossible"], known["contradictory"]
    text += (
        f"Of the {bad.rows} impossible rows support() tells {round((1 - bad.supported['student']) * bad.rows)}, of "
        f"the {off.rows} contradictory ones {round((1 - off.supported['student']) * off.rows)}; the largest "
        f"difference there is a factor of {math.exp(max(bad.worst['student'], off.worst['student'])):,.0f} in the "
        "price."
    )
    return text


def _why_supported(d: Distilled) -> str:
    sizes = {d.features.index(name) for name in SIZE}
    joint = [t for order in (2, 3) for t in d.chosen(order) if len(sizes.intersection(t)) > 1]
    if not joint:
        return "no fitted term joins two of carat, x, y and z, so nothing in the student knows that they go together. "
    names = [TIMES.join(d.features[f] for f in term) for term in joint]
    return f"it knows how they go together only through {listed(names)}. "


# ---- correlated features --------------------------------------------------------------------------------------------------


def _add_correlation(report: Report, found: dict[str, Refits], distilled: dict[str, Distilled]) -> None:
    report.section("Issue 4: correlated features")
    some = next(iter(found.values()))
    report.paragraph(
        f"Carat, x, y and z all say how large a diamond is. One teacher is distilled {len(some.students)} times, "
        "each time from a random half of the training rows. Spread: how far a main effect moves between these "
        "students (standard deviation, root mean square over the test rows). Explained by the others: R2 of a "
        "linear model of the feature from all other features."
    )
    for name, refits in found.items():
        d = distilled[name]
        others = _explained_by_others(d)
        rows = [
            (f, f"{refits.importance[k]:.3f}", f"{refits.spread[k]:.4f}", _relative(refits, k), f"{others[k]:.3f}")
            for k, f in enumerate(d.features)
        ]
        total = percent(refits.sum_spread / refits.sum_importance, 1)
        rows.append(("sum of carat, x, y and z", f"{refits.sum_importance:.3f}", f"{refits.sum_spread:.4f}", total, ""))
        header = ("Main effect", "importance", "spread", "spread of importance", "explained by the others")
        report.table(header, rows, caption=name)
        report.paragraph(_refits_sentence(refits, d))
    report.figures(
        [
            (
                refits_figure(distilled[name], refits),
                name,
                "Shapes of all refits. Orange: the four that say the same; blue: two that say something of their own.",
            )
            for name, refits in found.items()
        ],
        cell=520,
    )


def _relative(refits: Refits, place: int) -> str:
    return percent(float(refits.spread[place] / refits.importance[place]), 1)


def _refits_sentence(refits: Refits, d: Distilled) -> str:
    relative = refits.spread / refits.importance
    sizes = [d.features.index(name) for name in SIZE]
    # depth is a ratio of the sizes.
    own = [k for k, name in enumerate(d.features) if name not in (*SIZE, "depth")]
    alone = float((refits.spread[sizes] ** 2).sum().sqrt())
    most = int(relative.argmax())
    least, limit = float(refits.spread[sizes].min()), float(refits.spread[own].max())
    text = f"R2 to the teacher is {min(refits.r2):.5f} to {max(refits.r2):.5f} in all refits. "
    if least > limit:
        text += (
            f"Each of the four sizes moves more ({least:.3f} to {float(refits.spread[sizes].max()):.3f}) than any of "
            f"{listed([d.features[k] for k in own])} (at most {limit:.4f}). "
        )
    else:
        text += f"Not every size moves more than {listed([d.features[k] for k in own])} do. "
    text += f"Most in relation to its importance moves {d.features[most]}, by {percent(float(relative[most]), 0)}. "
    if refits.sum_spread < alone / CLEAR:
        text += (
            "The four sizes trade with each other: if they moved independently, their sum would move by "
            f"{alone:.3f}; it moves by {refits.sum_spread:.3f}. The sum is what the teacher determines, the split is "
            "not. "
        )
    else:
        text += "The sum of the four sizes moves no less than they would independently: they do not trade here. "
    worst = d.gam.report()
    text += (
        f"The report of the student gives its largest concurvity as {max(worst.concurvity):.2f}; near 1 the split "
        "between terms is decided by little. "
    )
    every = [p for p, count in refits.picked.items() if count == len(refits.students)]
    if len(every) == len(refits.picked):
        return text + f"All refits choose the same {count_of(len(every), 'pair')}."
    changing = [p for p in refits.picked if p not in every]
    names = [f"{TIMES.join(d.features[f] for f in p)} ({refits.picked[p]})" for p in changing]
    return text + (
        f"All refits choose {count_of(len(every), 'pair')} in common; others come and go (in how many of "
        f"{len(refits.students)}): {listed(names)}."
    )


def _explained_by_others(d: Distilled) -> list[float]:
    X = (d.held - d.held.mean(0)) / d.held.std(0)
    inverse = torch.linalg.pinv(torch.cov(X.T), hermitian=True)
    found: list[float] = (1 - 1 / inverse.diagonal().clamp_min(1.0)).tolist()
    return found


# ---- words ----------------------------------------------------------------------------------------------------------------


def percent(share: float, digits: int = 1) -> str:
    """A share for the page.

    Examples
    --------
    >>> percent(0.1234), percent(0.00026, 2)
    ('12.3\\xa0%', '0.03\\xa0%')
    """
    text = f"{100 * share:.{digits}f}"
    return f"{text.replace('-', chr(0x2212)) if float(text) else text.replace('-', '')}\u00a0%"


def listed(words: Sequence[str]) -> str:
    """Words as a sentence has them.

    Examples
    --------
    >>> listed(["a", "b", "c"]), listed([])
    ('a, b and c', 'none')
    """
    if len(words) < 2:
        return words[0] if words else "none"
    return f"{', '.join(words[:-1])} and {words[-1]}"


def count_of(count: int, what: str) -> str:
    """A number of things.

    Examples
    --------
    >>> count_of(1, "pair"), count_of(3, "pair")
    ('1 pair', '3 pairs')
    """
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
