"""The command line of the demo: which pages to write, and on what."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .artifacts import demo as artifacts_demo
from .concepts import demo as concepts_demo
from .distillation import demo as distillation_demo
from .influence import demo as influence_demo
from .measures import demo as measures_demo
from .photos import DEFAULT, PHOTOS
from .recurrent import demo as recurrent_demo
from .relevance import demo as relevance_demo
from .rollout import demo as rollout_demo
from .wheels import WeightsUnavailable

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Run the demo with command line arguments and return the exit status.

    Examples
    --------
    >>> main(["--smallest", "--out", "page.html"])  # doctest: +SKIP
    0
    """
    options = _parse(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        _check(options)
        pages = _write_pages(options, device)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ImportError, OSError, ValueError, WeightsUnavailable) as error:
        print(f"xai_fast demo: {error}", file=sys.stderr)
        return 1
    print()
    for page in pages:
        print(f"Open {page}")
    return 0


# Name to title and function, in the order in which they are written.
PAGES: dict[str, tuple[str, Callable[[argparse.Namespace, torch.device, list[tuple[str, str]]], Path]]] = {
    "rollout": ("Attention rollout", lambda *arguments: rollout_demo.write_rollout_page(*arguments)),
    "relevance": ("Targeted relevance and LRP", lambda *arguments: relevance_demo.write_relevance_page(*arguments)),
    "influence": ("Influence functions", lambda *arguments: influence_demo.write_influence_page(*arguments)),
    "measures": ("Measures of explanations", lambda *arguments: measures_demo.write_measures_page(*arguments)),
    "recurrent": ("Attention in recurrent networks", lambda *arguments: recurrent_demo.write_recurrent_page(*arguments)),
    "concepts": ("Concepts: TCAV", lambda *arguments: concepts_demo.write_concepts_page(*arguments)),
    "distillation": ("Distillation", lambda *arguments: distillation_demo.write_distillation_page(*arguments)),
    "artifacts": ("Artifacts and registers", lambda *arguments: artifacts_demo.write_artifacts_page(*arguments)),
}
# Option that saves a picture, and the page that it is taken from.
PICTURES = {
    "picture": "rollout",
    "relevance_picture": "relevance",
    "influence_picture": "influence",
    "measures_picture": "measures",
    "recurrent_picture": "recurrent",
    "distillation_picture": "distillation",
    "concepts_picture": "concepts",
    "artifacts_picture": "artifacts",
}


def _write_pages(options: argparse.Namespace, device: torch.device) -> list[Path]:
    """The pages that were asked for, each with links to the others that are written."""
    asked = [name for name in PAGES if options.pages in (name, "all")]
    pages = []
    for name in asked:
        links = [(PAGES[other][0], _file_name(options, other)) for other in asked if other != name]
        pages.append(PAGES[name][1](options, device, links))
    return pages


def _file_name(options: argparse.Namespace, page: str) -> str:
    return Path(options.out).name if page == "rollout" else f"{page}.html"


def _check(options: argparse.Namespace) -> None:
    others = {f"{page}.html" for page in PAGES if page != "rollout"}
    if options.pages == "all" and (name := Path(options.out).name) in others:
        raise ValueError(f"out: expected another name than {name}, which is another page")
    for option, page in PICTURES.items():
        if options.pages not in (page, "all") and getattr(options, option):
            raise ValueError(f"{option}: expected the page that it is taken from, got --pages {options.pages}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m xai_fast demo",
        description="HTML pages: attention rollout of photos by a DINOv2 vision transformer; targeted relevance and "
        "LRP of photos, sentences and a prompt; influence functions: the training pictures and mails behind a prediction; "
        "measures of explanations of photos and sentences; attention in recurrent networks that read reviews and dates; "
        "concepts behind the classes of an image classifier; distillation of black boxes into sums of shape functions; "
        "artifacts of vision transformers, and registers.",
    )
    add = parser.add_argument
    add("--pages", choices=(*PAGES, "all"), default="all", help="which pages (default: %(default)s)")
    add(
        "--out",
        default="demo_output/index.html",
        help="the rollout page; the others are written beside it under their names (default: %(default)s)",
    )
    add("--picture", help="also save the main rollout maps as one picture, for example rollout.png")
    add("--relevance-picture", help="also save the two objects of the relevance page as one picture")
    add("--influence-picture", help="also save the main figures of the influence page as one picture")
    add("--measures-picture", help="also save the photos of the measures page, their maps and curves, as one picture")
    add("--recurrent-picture", help="also save sentences and a date of the recurrent page, coloured, as one picture")
    add("--artifacts-picture", help="also save rollouts, norms and the control of the artifacts page as one picture")
    add("--concepts-picture", help="also save examples of the concepts and their scores as one picture")
    add("--distillation-picture", help="also save the main figures of the distillation page as one picture")
    add(
        "--model",
        choices=("auto", "dinov2", "digits"),
        default="auto",
        help="auto: dinov2, or digits if its weights cannot be had",
    )
    add("--photos", nargs="+", choices=tuple(PHOTOS), default=list(DEFAULT), help="photos of the rollout page")
    add("--size", type=int, default=448, help="side of these photos, a multiple of 14 (default: %(default)s)")
    add("--repeats", type=int, default=5, help="timed repeats of the rollout page (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--epochs", type=int, default=12, help="training of the digits model (default: %(default)s)")
    add("--smallest", action="store_true", help="as little as shows that it runs: one picture, one sentence, two repeats")
    options = parser.parse_args(argv)
    if options.smallest:
        options.photos, options.size, options.repeats = options.photos[:1], 224, 2
        options.epochs = min(options.epochs, 5)
    return options
