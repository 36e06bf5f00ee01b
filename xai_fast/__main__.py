"""``python -m xai_fast demo | info``: look at explanations, or at what this installation can do."""

from __future__ import annotations

import sys

USAGE = """usage: python -m xai_fast <command>

commands:
  demo   explanations of real models and what judges them, as HTML pages (demo --help)
  info   version, torch, CPU capability, CUDA kernels, and why the compiled module is missing if it is
"""


def main(argv: list[str]) -> int:
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command == "info":
        from . import show_config

        show_config()
        return 0
    if command == "demo":
        from .demo import main as demo

        return demo(rest)
    sys.stderr.write(USAGE)
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
