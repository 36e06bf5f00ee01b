"""What the artifacts page says about its numbers: sentences that turn when the numbers do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..rollout.sinks import SINK_FACTOR
from .dinov2 import Moved, Probed
from .register_training import Trained
from .study import (
    DROPPED,
    HIGH,
    MAD,
    ORIGINAL,
    PLAIN,
    PLANTED,
    REGISTER,
    REMOVED,
    SINK,
    UNPLANTED,
    Control,
    Maps,
    Real,
)

__all__ = ["about_control", "about_control_maps", "about_control_probes", "about_maps", "about_moves", "about_norms"]
__all__ += ["about_probes", "about_sinks", "about_training", "above", "percent", "training_rows"]

# A norm this many times the median is called high here; Darcet et al. find about ten times.
HIGH_RATIO = 3.0
# Changes of a share that are called none.
SAME = 0.1


def about_norms(real: Real) -> str:
    """Whether there are high norms at all."""
    photos, others = float(real.looked.largest().max()), float(real.largest.max())
    block = int(real.looked.largest().amax(1).argmax()) + 1
    seen = (
        f"The largest norm of a patch is {photos:.2f} times the median of its photo (after block {block}), and "
        f"{others:.2f} times on the {real.largest.shape[1]} pictures of the probes."
    )
    if max(photos, others) < HIGH_RATIO:
        return (
            f"{seen} That is a tail, not a second kind of token: this model has no high-norm tokens. It need "
            "not contradict the "
            "paper, which finds them in large models and not in small ones."
        )
    return f"{seen} Such tokens are high-norm tokens in the sense of the paper, in a model of a size that it found without."


def about_sinks(real: Real) -> str:
    """Whether sinks of attention and norm outliers are the same patches."""
    sinks, outliers = real.sinks, real.outliers[MAD].mask[..., 1:]
    if not sinks.any():
        return f"No patch receives more than {SINK_FACTOR:.0f} times the uniform attention in any block."
    per_block = sinks.sum((1, 2)).tolist()
    where = ", ".join(f"{count} in block {block}" for block, count in enumerate(per_block, 1) if count)
    both = int((sinks & outliers).sum())
    most = float(real.looked.received.max())
    text = (
        f"Patches that receive more than {SINK_FACTOR:.0f} times the uniform attention: {where}; at most "
        f"{most:.0f} times. "
        f"{both} of these {int(sinks.sum())} are norm outliers of that block by median and MAD."
    )
    if 2 * both < int(sinks.sum()):
        return text + " Here the sinks of attention and the outliers of the norms are different patches."
    return text + " Here most sinks of attention are outliers of the norms."


def about_maps(photos: Maps, objects: Maps, first_block: bool) -> str:
    """What each remedy does to the rollout; `first_block`: there are sinks of attention in block 1."""
    base = float(photos.of(PLAIN).largest.mean())
    changed = {name: float(photos.of(name).largest.mean()) / base for name in photos.maps if name != PLAIN}
    better = [f"{name} ({_percent_of(ratio)})" for name, ratio in changed.items() if ratio < 0.5]
    little = [f"{name} ({_percent_of(ratio)})" for name, ratio in changed.items() if ratio >= 0.5]
    text = f"On the photos the brightest patch holds {percent(base)} of the plain rollout on average."
    if better:
        text += f" It falls to less than half with: {_list(better)} of that."
    if little:
        text += f" It does not with: {_list(little)}."
    if REGISTER in changed and changed[REGISTER] < 0.5:
        text += " The test-time register mends it."
    elif REGISTER in changed:
        text += " The test-time register does not mend it"
        text += (
            ": the attention of block 1 comes before the first MLP, and what draws it there is no work of neurons."
            if first_block
            else "."
        )
    if objects.cover is not None:
        best = max(objects.maps, key=lambda name: _mass(objects, name))
        area = float(objects.cover.mean())
        text += (
            f" The object covers {percent(area)} of the pictures with known masks and gets "
            f"{percent(_mass(objects, PLAIN))} of "
            f"the plain rollout; the most, {percent(_mass(objects, best))}, with: {best}."
        )
    return text


def about_probes(probed: dict[str, Probed], both: int, pictures: int) -> str:
    """What the paper expects of high-norm tokens, against what the probes say of the two groups."""
    text = " ".join(f"{name}: {_against(probed[name], probed['Ordinary, as few'])}" for name in (HIGH, SINK))
    return f"{text} {both} tokens are in both groups and counted as {HIGH.lower()}. Pictures in all: {pictures}."


def _against(group: Probed, ordinary: Probed) -> str:
    """Position, pixels and class of a group against ordinary tokens, in words; differences within the spread "
    "are none."""
    questions = (("position", "accuracy", 1, "position"), ("pixels", "r2", 1, "pixels"), ("class", "accuracy", 1, "class"))
    words: dict[str, list[str]] = {"better": [], "worse": [], "no clear difference": []}
    for kind, field, sign, name in questions:
        difference = sign * (group.values(kind, field) - ordinary.values(kind, field))
        error = float(difference.std()) / len(difference) ** 0.5
        clear = abs(float(difference.mean())) > 2 * error
        words[("better" if difference.mean() > 0 else "worse") if clear else "no clear difference"].append(name)
    return "; ".join(f"{word} for {_list(names)}" for word, names in words.items() if names) + "."


def about_moves(of_sinks: Moved | None, of_outliers: Moved | None) -> str:
    """Which neurons were found, and what moving them did to the norms."""
    parts = []
    for name, change in (("at the sink patches of block 1", of_sinks), ("at the norm outliers of block 11", of_outliers)):
        if change is None:
            parts.append(f"There are no tokens {name} on these photos, and so no neurons.")
            continue
        found = ", ".join(f"{neuron.layer + 1}/{neuron.neuron} ({neuron.score:.1f})" for neuron in change.neurons[:5])
        parts.append(
            f"Most active {name} (block/neuron, mean activation): {found}; {len(change.neurons)} were moved. "
            "The largest norm "
            f"over the median, at its highest over the blocks, goes from {above(change.before)} to "
            f"{above(change.after)}; the "
            f"register has up to {above(change.register)} times the median and receives up to "
            f"{float(change.received.max()):.0f} "
            f"times the uniform attention. CLS keeps a cosine of {change.similarity:.2f} to what it was."
        )
    return " ".join(parts)


def above(ratio: torch.Tensor) -> str:
    """The largest of some ratios.

    Examples
    --------
    >>> above(torch.tensor([1.0, 2.345]))
    '2.3'
    """
    return f"{float(ratio.max()):.1f}"


def about_control(control: Control) -> str:
    """Whether outliers and neurons that are there are found."""
    fired, found = int(control.fired.sum()), int(control.found.sum())
    hits = int((control.fired & control.found).sum())
    onset = "none" if control.layers.onset is None else str(control.layers.onset + 1)
    names = ", ".join(f"{neuron.layer + 1}/{neuron.neuron}" for neuron in control.top[: len(control.neurons)])
    verdict = "all of them planted" if control.recovered == len(control.neurons) else f"{control.recovered} of them planted"
    received = float(control.looked.received[:, control.fired].mean(1).max()) if fired else float("nan")
    return (
        f"The planted neurons fire at {fired} of {control.fired.numel()} patches "
        f"({percent(fired / control.fired.numel())}). "
        f"Median + 5 MAD calls {found} patches outliers after block {control.block + 1}, {hits} of them with "
        "planted activity: "
        f"it finds {percent(hits / max(fired, 1))} of what was planted, and {percent(hits / max(found, 1))} of "
        "what it finds was "
        f"planted. By share of outliers in the whole model the onset is block {onset}"
        f"{_onset_is(control)}. The largest norm is {above(control.looked.largest().mean(1))} times the median. "
        f"Planted patches receive up to {received:.0f} times the uniform attention. "
        f"The {len(control.neurons)} most active neurons at the outliers (block/neuron) are {names or 'none'}: {verdict}."
    )


def _onset_is(control: Control) -> str:
    if control.layers.onset == control.block:
        return ", where they were planted"
    return f", not block {control.block + 1}: the tails of the norms of other blocks count as outliers, too"


def about_control_maps(control: Control) -> str:
    """What was moved, and what came of the rollout."""
    change, maps = control.moved, control.maps
    shares = {name: float(maps.of(name).largest.mean()) for name in maps.maps}
    gone = above(change.after)
    text = (
        f"With these neurons moved to one register the largest norm of a patch, up to {above(change.before)} "
        "times the median, "
        f"is at most {gone} times; the register has {above(change.register)} times and receives up to "
        f"{float(change.received.max()):.0f} times the uniform attention. "
    )
    rise = shares[PLANTED] > (1 + SAME) * shares[ORIGINAL]
    text += (
        f"The brightest patch of the rollout from block {control.block + 2} goes from {percent(shares[ORIGINAL])} to "
        f"{percent(shares[PLANTED])} by planting, to {percent(shares[DROPPED])} with the outliers dropped and to "
        f"{percent(shares[REGISTER])} with the register: "
    )
    mended = shares[REGISTER] < (shares[ORIGINAL] + shares[PLANTED]) / 2
    text += "the register mends what was planted." if rise and mended else "the register does not mend it."
    if maps.cover is not None:
        masses = [percent(_mass(maps, name)) for name in (ORIGINAL, PLANTED, DROPPED, REGISTER)]
        text += f" Mass on the object, in the same order: {', '.join(masses)}."
        back = abs(_mass(maps, REGISTER) - _mass(maps, ORIGINAL)) < abs(_mass(maps, PLANTED) - _mass(maps, ORIGINAL))
        text += (
            " By this the register comes nearer to the original"
            if back
            else " By this it does not come nearer to the original"
        )
        text += " than the planted map is."
    near = control.similarity
    text += (
        f" CLS has a cosine of {near[PLANTED]:.2f} to the original model's when planted, {near[REGISTER]:.2f} "
        "with the register, "
        f"and {near[REMOVED]:.4f} when the activity goes nowhere (no register): the register itself draws "
        "attention that "
        "no token drew before."
    )
    return text


def about_control_probes(control: Control) -> str:
    """The same tokens before and after planting."""
    after, before = control.probed[HIGH], control.probed[UNPLANTED]
    return (
        f"The same patches with their planted norms, against themselves before: {_against(after, before)} "
        "The vector that was planted holds nothing of the picture: no gain for the class is to be expected, "
        "other than in models that learned "
        "such tokens."
    )


def about_training(rounds: Sequence[Sequence[Trained]]) -> str:
    """What registers changed in small models, against the spread over seeds."""
    plain, with_ = ([pair[place] for pair in rounds] for place in (0, -1))
    largest = max(float(found.largest_ratio.max()) for pair in rounds for found in pair)
    text = (
        f"The largest norm of a patch is {largest:.1f} times the median on average at most"
        f"{': no model of this size has high-norm tokens, with or without registers' if largest < HIGH_RATIO else ''}. "
    )
    if len(rounds) < 2:
        return text + "One seed says nothing about what is chance."
    clear: list[str] = []
    open_: list[str] = []
    for name, value in MEASURES.items():
        differences = torch.tensor([value(b) - value(a) for a, b in zip(plain, with_, strict=True)])
        sure = abs(float(differences.mean())) > 2 * float(differences.std()) / len(differences) ** 0.5
        (clear if sure else open_).append(name)
    text += f"Beyond two standard errors over {len(rounds)} seeds registers change: {_list(clear)}." if clear else ""
    text += f" Not beyond chance: {_list(open_)}." if open_ else ""
    return text.strip()


# What is compared between models.
MEASURES: dict[str, Callable[[Trained], float]] = {
    "accuracy": lambda found: found.accuracy,
    "largest norm over median": lambda found: float(found.largest_ratio[-1]),
    "share of outliers": lambda found: float(found.outliers.share[-1]),
    "rollout concentration": lambda found: found.concentration,
}


def training_rows(rounds: Sequence[Sequence[Trained]]) -> list[tuple[str, ...]]:
    """The table of the models: one column for each number of registers, means over seeds with their deviation."""
    counts = range(len(rounds[0]))
    rows = []
    for name, (value, digits) in TABLE.items():
        cells = []
        for place in counts:
            values = torch.tensor([float(value(pair[place])) for pair in rounds])
            around = f" ± {float(values.std()):.{digits}f}" if len(values) > 1 else ""
            known = bool(values.isfinite().all())
            cells.append(f"{float(values.mean()):.{digits}f}{around}" if known else "none")
        rows.append((name, *cells))
    return rows


TABLE: dict[str, tuple[Callable[[Trained], float], int]] = {
    "Accuracy on test pictures": (lambda found: found.accuracy, 3),
    "Largest norm of a patch, last block": (lambda found: float(found.norms[-1, :, 1 + found.registers :].max()), 1),
    "Largest norm over median, last block": (lambda found: float(found.largest_ratio[-1]), 2),
    "Share of outliers (median + 5 MAD), last block": (lambda found: float(found.outliers.share[-1]), 4),
    "Share of outliers, worst block": (lambda found: float(found.outliers.share.max()), 4),
    "Norm of registers over patches, last block": (lambda found: float(found.register_ratio[-1]), 2),
    "Rollout, largest share over uniform": (lambda found: found.concentration, 2),
}


def _mass(maps: Maps, name: str) -> float:
    mass = maps.of(name).mass
    assert mass is not None
    return float(mass.mean())


def percent(share: float) -> str:
    """A share for a reader.

    Examples
    --------
    >>> percent(0.0345), percent(0.72)
    ('3.5\\xa0%', '72\\xa0%')
    """
    return f"{100 * share:.{1 if share < 0.1 else 0}f}\N{NO-BREAK SPACE}%"


def _percent_of(ratio: float) -> str:
    return f"{100 * ratio:.0f}\N{NO-BREAK SPACE}%"


def _list(words: Sequence[str]) -> str:
    if len(words) < 2:
        return words[0] if words else "none"
    return f"{', '.join(words[:-1])} and {words[-1]}"
