"""The HTML page of artifacts of vision transformers, and of registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from xai_fast.viz import Report

from ..pages import add_part, add_text, add_versions, new_page
from ..rollout.sinks import SINK_FACTOR
from . import findings
from .dinov2 import Probed
from .figures import map_over, norms_figure, outlier_mask, received_figure
from .register_training import Trained
from .study import HIGH, PLAIN, SINK, Control, Maps, Real

__all__ = ["build_artifacts_page", "shown_photos"]

# Photos whose rollouts are shown, and pictures of the control.
SHOWN, SHOWN_CONTROL = 3, 2

QUESTIONS = (
    "Darcet et al. (2024), Vision Transformers Need Registers (arXiv 2309.16588): in large vision transformers "
    "about 2 % of the "
    "patches, mostly in uniform parts of a picture, end with norms about ten times those of the others. Linear "
    "probes find less "
    "of their position and their pixels in them and more of the class of the whole picture: the model uses them "
    "as scratch "
    "space. They draw attention and spoil attention maps. Models trained with registers, extra tokens of their "
    "own, do not have "
    "them.",
    "Jiang et al. (2025), Vision Transformers Don't Need Trained Registers (arXiv 2506.08010): a few neurons of "
    "the MLPs make "
    "such tokens. Moving their activity to an extra token at test time takes the high norms away from the "
    "patches, without "
    "training.",
    "The page asks this of a real DINOv2 ViT-S/14, whose plain rollout collapses on a single patch: does it "
    "have such tokens? "
    "Is the patch one of them? Do registers mend the map? Then it plants high-norm tokens in a copy, to see "
    "that the tools find "
    "and move them where they exist, and trains small models with and without registers.",
)

READING = (
    "A quantile calls the same share of tokens outliers in every model, and median + 5 MAD calls the end of a "
    "long tail "
    "outliers: a count of outliers is no evidence of two kinds of tokens. The largest norm over the median is.",
    "Norms are taken after each block, before the final normalisation, which makes them alike.",
    "Planted tokens are built to be found: four neurons of a block fire at flat patches and write one large "
    "vector, chosen so "
    "that later blocks attend to it. The control shows that the tools work where the phenomenon is, not that "
    "models learn it in "
    "this way.",
    "Dropping tokens from the rollout and painting over them change the map, not the model. A map that looks "
    "better need not be "
    "truer; the mass on the object is a weak check, as the model may look elsewhere for good reasons.",
)


def build_artifacts_page(
    real: Real | str, control: Control | str, trained: Sequence[Sequence[Trained]] | str, links: Sequence[tuple[str, str]]
) -> Report:
    """Put everything on one page, ready to be written.

    Parameters
    ----------
    real, control : Real, Control or str
        What was measured on DINOv2, or why it is left out.
    trained : sequence of sequences of Trained, or str
        For each seed the models without and with registers.
    links : sequence of (str, str)
        See `Report`.

    Examples
    --------
    >>> build_artifacts_page("no weights", "no weights", "no data", []).html().count("Left out: no ")
    3
    """
    report = new_page(
        "Artifacts of vision transformers, and registers",
        "Some patches hold what does not belong to them. Which, since when, and where can it be put instead?",
        links,
    )
    add_text(report, "The questions", QUESTIONS)
    if isinstance(real, str):
        report.section("DINOv2 ViT-S/14").note(f"Left out: {real}.")
    else:
        for title, add in PARTS:
            report.section(title)
            add(report, real)
    report.section("A control: high norms planted in a copy")
    add_part(report, control, _add_control)
    report.section("Small models trained with and without registers")
    add_part(report, trained, _add_trained)
    add_text(report, "How to read this", READING)
    add_versions(report)
    return report


def shown_photos(real: Real) -> list[int]:
    """Places of the photos whose maps are shown."""
    return list(range(min(SHOWN, len(real.names))))


# ---- the real model -------------------------------------------------------------------------------------------------------


def _add_norms(report: Report, real: Real) -> None:
    count = real.looked.patches[0].numel()
    report.paragraph(
        f"{len(real.names)} photos of scikit-image ({', '.join(real.names)}) at 224 x 224, {count} patches. The "
        "model is the one "
        "of the rollout page, a backbone fine-tuned for saliency. Norms are compared within a block: their "
        "median goes from "
        f"{float(real.looked.patches[0].median()):.1f} after the first to "
        f"{float(real.looked.patches[-1].median()):.1f} after the last."
    )
    report.paragraph(findings.about_norms(real))
    figures: list[tuple[Any, str, str]] = [
        (norms_figure(real.looked), "Norms per block", "All photos; the scale is logarithmic.")
    ]
    report.figures(figures, cell=620)
    maps = []
    for place in shown_photos(real):
        for block in (-2, -1):
            norms = real.looked.patches[block, place]
            caption = f"{float(norms.min()):.1f} to {float(norms.max()):.1f}, median {float(norms.median()):.1f}."
            title = f"{real.names[place].capitalize()}, block {len(real.looked.patches) + block + 1}"
            maps.append((map_over(real.shown[place], norms), title, caption))
    report.paragraph(
        "Norms of the patches after the last block but one and after the last, before the final normalisation; "
        "bright is high, "
        "each map on its own scale."
    )
    report.figures(maps, cell=180, format="jpeg")


def _add_outliers(report: Report, real: Real) -> None:
    blocks = [str(block + 1) for block in range(len(real.looked.norms))]
    rows: list[Sequence[str]] = [
        (rule, *(str(int(mask.sum())) for mask in found.mask)) for rule, found in real.outliers.items()
    ]
    ratio = real.looked.largest()
    rows.append(("Largest norm / median, largest of all photos", *(f"{float(x):.2f}" for x in ratio.amax(1))))
    rows.append((f"Attention > {SINK_FACTOR:.0f} x uniform", *(str(int(x.sum())) for x in real.sinks)))
    both = (real.sinks & outlier_mask(real)).sum((1, 2))
    rows.append(("of these, outliers by MAD", *(str(int(x)) for x in both)))
    report.table(("Patches after block", *blocks), rows, caption=f"Outliers among {real.looked.patches[0].numel()} patches")
    report.paragraph(
        "The absolute threshold is the paper's for DINOv2-g. It depends on the model and the block: where the "
        "largest norm is "
        "below it, it says nothing. The quantile finds its 2 % in any model."
    )
    report.paragraph(findings.about_sinks(real))
    caption = "Each point is a patch; red: norm outlier by median + 5 MAD. Above the dashed line a patch is called a sink."
    figure = received_figure(real.looked, outlier_mask(real), SINK_FACTOR)
    report.figures([(figure, "Attention received against norm", caption)], cell=900)


def _add_rollouts(report: Report, real: Real) -> None:
    report.paragraph(
        "Outliers dropped: attention to the outliers of the last block but one (median + 5 MAD) is taken out "
        "of every block. "
        f"Sink patches dropped: the same for patches that receive more than {SINK_FACTOR:.0f} times the uniform "
        "attention "
        "somewhere. Test-time register: the ten neurons that are most active at the sink patches of block 1, "
        "moved to one "
        "register. From block 2: block 1 is left out of the product."
    )
    for place in shown_photos(real):
        figures: list[tuple[Any, str, str]] = [(real.shown[place], real.names[place].capitalize(), "What the model gets.")]
        for name, maps in real.photo_maps.maps.items():
            figures.append((map_over(real.shown[place], maps[place]), name, _caption(real.photo_maps, name, place)))
        report.figures(figures, cell=180, format="jpeg")
    _concentrations(report, real.photo_maps, real.object_maps, f"{len(real.names)} photos", real.pictures.about)
    report.paragraph(findings.about_maps(real.photo_maps, real.object_maps, bool(real.sinks[0].any())))


def _caption(maps: Maps, name: str, place: int) -> str:
    of = maps.of(name)
    text = f"Brightest patch {findings.percent(float(of.largest[place]))}, spread {float(of.spread[place]):.0f} patches"
    return text + (f", on the object {findings.percent(float(of.mass[place]))}." if of.mass is not None else ".")


def _concentrations(report: Report, photos: Maps, objects: Maps, first: str, about: str) -> None:
    rows = []
    for name in photos.maps:
        cells = [name]
        for maps in (photos, objects):
            if name not in maps.maps:
                cells += ["", ""]
                continue
            of = maps.of(name)
            cells += [findings.percent(float(of.largest.mean())), f"{float(of.spread.mean()):.0f}"]
        mass = objects.of(name).mass if name in objects.maps else None
        cells.append("no masks" if mass is None else findings.percent(float(mass.mean())))
        rows.append(cells)
    header = ("Means", "Largest share", "Spread", "Largest share, pictures", "Spread, pictures", "On the object")
    report.table(header, rows, caption=f"Concentration of the rollout: {first}; {len(objects.maps[PLAIN])} pictures")
    report.paragraph(
        f"Spread is the exponential of the entropy, in patches: 256 for an even map. The pictures are {about}; "
        "the first ones of them."
    )


def _add_probes(report: Report, real: Real) -> None:
    report.paragraph(
        f"Do outlying tokens know less of their place and their pixels, and more of the picture? The pictures are "
        f"{real.pictures.about}. Tokens after the last block but one; the {HIGH.lower()} of a picture and those "
        f"{SINK.lower()} "
        "are five patches each, 2 % of all. Since few tokens make a worse probe, the group to compare them with "
        "is as many "
        "ordinary patches of the same pictures. No picture is in both the fit and the test of a probe."
    )
    _probe_table(report, real.probed)
    report.paragraph(
        "Against as many ordinary patches; a difference counts from two standard errors over the folds. The "
        "groups lie in other "
        "places than ordinary patches do, as the errors of the mean place show, and are flatter or richer: "
        "these are differences "
        "between groups, not effects of the norm. "
        f"{findings.about_probes(real.probed, real.both, len(real.pictures.labels))}"
    )


def _probe_table(report: Report, probed: dict[str, Probed]) -> None:
    fields = (
        ("Position, right (chance 0.4\N{NO-BREAK SPACE}%)", "position", "accuracy", True),
        ("Distance, patches", "coordinates", "distance", False),
        ("with the mean place", "coordinates", "baseline", False),
        ("Pixels, error", "pixels", "error", False),
        ("with the mean patch", "pixels", "baseline", False),
        ("Pixels, R\N{SUPERSCRIPT TWO}", "pixels", "r2", False),
        ("Class, right", "class", "accuracy", True),
        ("most frequent class", "class", "baseline", True),
    )
    rows: list[list[str]] = [["Tokens", *(str(group.tokens) for group in probed.values())]]
    tests = [sum(probe.n_test for probe in group.probes["class"]) for group in probed.values()]
    rows.append(["of these tested, all folds", *map(str, tests)])
    for title, kind, field, is_share in fields:
        rows.append([title, *(_mean(group, kind, field, is_share) for group in probed.values())])
    folds = len(next(iter(probed.values())).probes["class"])
    report.table(
        (f"Mean of {folds} folds ± deviation", *probed), rows, caption="Linear probes on held-out pictures, closed form"
    )


def _mean(group: Probed, kind: str, field: str, is_share: bool) -> str:
    mean, spread = group.mean(kind, field)
    if mean != mean:
        return "no value"
    scale, unit = (100, "\N{NO-BREAK SPACE}%") if is_share else (1, "")
    digits = 1 if is_share else 2
    around = f" ± {scale * spread:.{digits}f}" if spread == spread else ""
    return f"{scale * mean:.{digits}f}{around}{unit}".replace("-", "\N{MINUS SIGN}")


def _add_moves(report: Report, real: Real) -> None:
    report.paragraph(
        "What a test-time register needs: tokens that stand out, neurons that are active there, and later "
        "attention that goes "
        "to what the neurons wrote."
    )
    report.paragraph(findings.about_moves(real.moved_sinks, real.moved_outliers))


PARTS: tuple[tuple[str, Callable[[Report, Real], None]], ...] = (
    ("Norms of the tokens of DINOv2", _add_norms),
    ("Outliers, and sinks of attention", _add_outliers),
    ("Rollout, and what mends it", _add_rollouts),
    ("What the tokens know", _add_probes),
    ("What test-time registers found here", _add_moves),
)


# ---- the control ----------------------------------------------------------------------------------------------------------


def _add_control(report: Report, control: Control) -> None:
    report.paragraph(
        f"In a copy of the model {len(control.neurons)} of the 1536 neurons of block {control.block + 1} were "
        "overwritten "
        f"({', '.join(map(str, control.neurons))}), fitted on {control.fitted} other pictures. They fire at "
        "few, flat patches and "
        f"write a vector there that later blocks attend to. What follows is of {len(control.pictures.labels)} "
        "pictures; the tools "
        "are not told what was planted."
    )
    report.paragraph(findings.about_control(control))
    report.figures([(norms_figure(control.looked), "Norms per block, planted", "The scale is logarithmic.")], cell=620)
    report.paragraph("The pictures on which planting concentrates the rollout most, from the block after it:")
    for place in control.clearest(SHOWN_CONTROL):
        picture = control.pictures.shown[place]
        figures: list[tuple[Any, str, str]] = [(picture, "Picture", "What the model gets.")]
        for name, maps in control.maps.maps.items():
            figures.append((map_over(picture, maps[place]), name, _caption(control.maps, name, place)))
        report.figures(figures, cell=200, format="jpeg")
    report.paragraph(findings.about_control_maps(control))
    rows = [
        ("Largest patch norm / median, planted", *(f"{float(x):.1f}" for x in control.moved.before)),
        ("with the register", *(f"{float(x):.1f}" for x in control.moved.after)),
        ("Register norm / median", *(f"{float(x):.1f}" for x in control.moved.register)),
        ("Attention to the register / uniform", *(f"{float(x):.0f}" for x in control.moved.received)),
    ]
    blocks = [str(block + 1) for block in range(len(control.moved.before))]
    report.table(("After block", *blocks), rows, caption="What the register took over (means over pictures)")
    _probe_table(report, control.probed)
    report.paragraph(findings.about_control_probes(control))


# ---- small models ---------------------------------------------------------------------------------------------------------


def _add_trained(report: Report, rounds: Sequence[Sequence[Trained]]) -> None:
    counts = [found.registers for found in rounds[0]]
    accuracy = torch.tensor([found.accuracy for pair in rounds for found in pair])
    report.paragraph(
        f"Vision transformers of {len(rounds[0][0].model.blocks)} blocks trained on Fashion-MNIST just now, with "
        f"{' and '.join(map(str, counts))} registers, {len(rounds)} seed{'s' if len(rounds) > 1 else ''} each, "
        "the same pictures in the same order. They are small and undertrained "
        f"({findings.percent(float(accuracy.mean()))} of the test pictures right on average), and the paper finds "
        "high norms only in large models after long training."
    )
    report.table(
        ("Mean over seeds ± deviation", *(f"{count} registers" for count in counts)),
        findings.training_rows(rounds),
        caption="With and without registers",
    )
    report.paragraph(findings.about_training(rounds))
