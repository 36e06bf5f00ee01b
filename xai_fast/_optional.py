"""Import packages that only some features need, with an error that says how to install them."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["optional_import"]


def optional_import(module: str, extra: str) -> ModuleType:
    """Import `module`, or say in one line which extra of xai_fast brings it.

    Parameters
    ----------
    module : str
        Dotted module name, for example ``"matplotlib.pyplot"``.
    extra : str
        The extra of xai_fast that installs it, for example ``"demo"``.

    Returns
    -------
    ModuleType
        The imported module (for a dotted name: the innermost one).

    Raises
    ------
    ImportError
        If the package is not installed. A package that is installed but breaks while it is imported keeps its
        own error: hiding that behind an install hint would send the reader the wrong way.

    Examples
    --------
    >>> optional_import("json", "demo").dumps([1])
    '[1]'
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(
            f'{package} is not installed and this needs it: pip install "xai_fast[{extra}]"', name=package
        ) from error
