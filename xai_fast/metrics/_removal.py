"""Removal of features by rank: one stream of forward passes for every measure that removes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ._baselines import Baseline, make_baseline
from ._features import Features
from ._forwards import Forwards

__all__ = ["Removal", "levels"]

Read = Callable[[Tensor, Tensor], Tensor]


class Removal:
    """Samples with features replaced by a baseline, run through the model in chunks."""

    def __init__(
        self, forwards: Forwards, features: Features, baseline: Baseline, generator: torch.Generator | None = None
    ) -> None:
        self.forwards, self.features = forwards, features
        inputs = forwards.inputs
        filler = make_baseline(baseline, inputs, generator)
        self.x = features.view(inputs.contiguous())
        shared = filler.shape[1:].numel() == 1
        self.filler = (
            filler.view(-1, 1, 1, 1) if shared else features.view(filler.expand(filler.shape[0], *inputs.shape[1:]))
        )

    def by_rank(self, ranks: Tensor, first: Tensor, last: Tensor, read: Read) -> Tensor:
        """`read` of the outputs with ranks first .. last - 1 replaced: ranks (B,F), first, last (B,K) -> (B,K,...)."""
        batch, levels = first.shape
        sample = torch.arange(batch, device=first.device).repeat_interleave(levels)
        first, last = first.flatten().int(), last.flatten().int()
        places = self.features.at_positions(ranks)

        def make(part: slice) -> Tensor:
            return ops.replace_ranked(self.x, self.filler, places, sample=sample[part], first=first[part], last=last[part])

        return self._run(sample, make, read).unflatten(0, (batch, levels))

    def by_subset(self, gone: Tensor, subset: Tensor, sample: Tensor, read: Read) -> Tensor:
        """The same with sets of features replaced: of `gone` (R,F), booleans, example e takes row subset[e] -> (E,...)."""
        if self.features.groups is None or len(self.features.groups) == 1:
            table = self._as_ranks(gone, None)
            return self._by_ranking(lambda part: (table, subset[part]), sample, read)
        return self.by_mask(lambda part: gone[subset[part]], sample, read)

    def by_mask(self, gone: Callable[[slice], Tensor], sample: Tensor, read: Read) -> Tensor:
        """The same where a chunk has sets (e,F) of its own -> (E,...)."""

        def own(part: slice) -> tuple[Tensor, Tensor]:
            of = sample[part]
            return self._as_ranks(gone(part), of), torch.arange(len(of), device=of.device)

        return self._by_ranking(own, sample, read)

    def _as_ranks(self, gone: Tensor, sample: Tensor | None) -> Tensor:
        """Rank 0 where a feature goes, 1 where it stays."""
        return self.features.at_positions((~gone).int(), sample)

    def _by_ranking(self, ranks_of: Callable[[slice], tuple[Tensor, Tensor]], sample: Tensor, read: Read) -> Tensor:
        def make(part: slice) -> Tensor:
            of, (ranks, ranking) = sample[part], ranks_of(part)
            first, last = torch.zeros_like(of), torch.ones_like(of)
            return ops.replace_ranked(self.x, self.filler, ranks, sample=of, first=first, last=last, ranking=ranking)

        return self._run(sample, make, read)

    def by_weight(self, keep: Tensor, read: Read) -> Tensor:
        """`read` of the outputs on x' = k x + (1 - k) baseline, k (B,F) from 0 to 1 -> (B,...)."""
        sample = torch.arange(len(keep), device=keep.device)
        k = self.features.at_positions(keep)[:, None, :, None].to(self.x.dtype)
        filler = self.filler.expand_as(self.x)
        return self._run(sample, lambda part: torch.lerp(filler[part], self.x[part], k[part]), read)

    def _run(self, sample: Tensor, make: Callable[[slice], Tensor], read: Read) -> Tensor:
        shape = self.forwards.inputs.shape[1:]
        results = []
        for part in self.forwards.chunks(len(sample)):
            outputs = self.forwards(make(part).view(-1, *shape), sample[part])
            results.append(read(outputs, sample[part]))
        return torch.cat(results)


def levels(count: int, steps: int, device: torch.device) -> Tensor:
    """(K,) whole numbers of features from 0 to `count` in `steps` equal steps, each once."""
    steps = min(steps, count)
    return (torch.arange(steps + 1, device=device, dtype=torch.float64) * (count / steps)).round().long()
