"""The l2 of the mean objective, however the library that trained the model writes it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Penalty"]


@dataclass(frozen=True)
class Penalty:
    """Strength of the regulariser before n, the number of training rows, is known.

    Attributes
    ----------
    strength : float
    scale : {"mean", "sum", "average"}
        What it was weighed against: "mean", (1/n) sum_i s_i loss_i, as here; "sum", sum_i s_i loss_i, so that
        l2 = strength / n; "average", sum_i s_i loss_i / sum_i s_i, so that l2 = strength times the mean of s.
    """

    strength: float
    scale: str = "mean"

    @property
    def known(self) -> float | None:
        """l2, if it does not depend on n."""
        return None if self.scale == "sum" and self.strength else self.strength

    def l2(self, rows: int, mean_weight: float = 1.0) -> float:
        return self.strength * {"mean": 1.0, "sum": 1.0 / rows, "average": mean_weight}[self.scale]
