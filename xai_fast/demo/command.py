"""The command line of the demo: which pages to write, and on what."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import relevance_demo, rollout_demo
from .photos import DEFAULT, PHOTOS
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


def _write_pages(options: argparse.Namespace, device: torch.device) -> list[Path]:
    """The pages that were asked for, each with a link to the other if both are."""
    both = options.pages == "all"
    pages = []
    if options.pages != "relevance":
        links = [("Targeted relevance and LRP", "relevance.html")] if both else []
        pages.append(rollout_demo.write_rollout_page(options, device, links))
    if options.pages != "rollout":
        links = [("Attention rollout", Path(options.out).name)] if both else []
        pages.append(relevance_demo.write_relevance_page(options, device, links))
    return pages


def _check(options: argparse.Namespace) -> None:
    if options.pages == "all" and Path(options.out).name == "relevance.html":
        raise ValueError("out: expected another name than relevance.html, which is the second page")
    for page, option in (("relevance", "picture"), ("rollout", "relevance_picture")):
        if options.pages == page and getattr(options, option):
            raise ValueError(f"{option}: expected the page that it is taken from, got --pages {page}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m xai_fast demo",
        description="Two HTML pages: attention rollout of photos by a DINOv2 vision transformer; targeted relevance and LRP "
        "of photos, sentences and a prompt.",
    )
    add = parser.add_argument
    add("--pages", choices=("rollout", "relevance", "all"), default="all", help="which pages (default: %(default)s)")
    add(
        "--out",
        default="demo_output/index.html",
        help="the rollout page; relevance.html is written beside it (default: %(default)s)",
    )
    add("--picture", help="also save the main rollout maps as one picture, for example rollout.png")
    add("--relevance-picture", help="also save the two objects of the relevance page as one picture")
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
