"""Importing from the folder of packages that `make bench` installs outside site-packages."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from .fast_vit_rollout import PEERS

__all__ = ["importable"]


@contextmanager
def importable(quiet: bool = False) -> Iterator[None]:
    """The folder is searched last, warnings are silent; `quiet`: what is printed as well."""
    from tests.peers import torchvision_shim  # noqa: F401  must come before torchvision

    sys.path.append(str(PEERS))
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")
            if quiet:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            yield
    finally:
        sys.path.remove(str(PEERS))
