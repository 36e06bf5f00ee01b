"""Naming the patch on which a rollout collapses."""

from __future__ import annotations

import torch

import xai_fast
from xai_fast.demo.rollout.sinks import find_sink, outlier_scores

SINK = 37  # patch of an 8 x 8 grid, row 4, column 5


def _attentions(sink_blocks: tuple[int, ...], blocks: int = 4) -> list[torch.Tensor]:
    """Random attention; in the given blocks every token sends half of it to one patch."""
    layers = []
    for block in range(blocks):
        attention = torch.rand(1, 2, 65, 65).softmax(-1)
        if block in sink_blocks:
            attention = 0.5 * attention
            attention[..., 1 + SINK] += 0.5
        layers.append(attention)
    return layers


def _hidden(norm: float) -> list[torch.Tensor]:
    states = []
    for _ in range(5):
        directions = torch.nn.functional.normalize(torch.randn(1, 65, 16), dim=-1)
        state = directions * (1 + 0.1 * torch.rand(1, 65, 1))
        state[:, 1 + SINK] *= norm
        states.append(state)
    return states


def test_finds_the_sink_and_its_blocks() -> None:
    attentions = _attentions((0, 1))
    rollout = xai_fast.attention_rollout(attentions)
    sink, mask = find_sink(rollout, attentions, _hidden(5.0), (8, 8))
    assert sink is not None
    assert (sink.patch, sink.row, sink.column) == (SINK, 4, 5)
    assert (sink.first_block, sink.last_block, sink.blocks) == (0, 1, "1 to 2")
    assert mask.nonzero().tolist() == [[4, 5]]
    assert abs(sink.share - float(rollout[0, 1 + SINK] / rollout[0, 1:].sum())) < 1e-6
    assert sink.input_norm[2] > 3.5
    assert "row 5, column 6" in sink.describe()
    assert "a high-norm outlier" in sink.describe()


def test_ordinary_norm_is_said_to_be_ordinary() -> None:
    attentions = _attentions((0,))
    sink, _ = find_sink(xai_fast.attention_rollout(attentions), attentions, _hidden(1.0), (8, 8))
    assert sink is not None
    assert "a high-norm outlier" not in sink.describe()


def test_no_sink_in_even_attention() -> None:
    attentions = _attentions(())
    sink, mask = find_sink(xai_fast.attention_rollout(attentions), attentions, _hidden(1.0), (8, 8))
    assert sink is None
    assert not mask.any()


def test_outlier_scores_of_a_constant_are_zero() -> None:
    assert outlier_scores(torch.ones(5)).tolist() == [0.0] * 5
