"""The two recurrent models: padding, masks, decoding, and what they say about themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xai_fast.attention import signed_attention
from xai_fast.attention.rnn import BOS, EOS, PAD, BiLSTMClassifier, Seq2Seq

ROWS = ([4, 5, 6, 7, 8], [9, 3], [5, 4, 9])
OUTPUTS = ([3, 4, 5, EOS], [5, EOS], [3, 3, EOS])


def padded(rows: tuple[list[int], ...]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


@pytest.fixture
def classifier() -> BiLSTMClassifier:
    return BiLSTMClassifier(vocab=10, dim=4, hidden=6, classes=3).double()


@pytest.fixture
def translator() -> Seq2Seq:
    return Seq2Seq(source_vocab=10, target_vocab=6, dim=4, hidden=6).double()


def test_classifier_padding_changes_nothing(classifier: BiLSTMClassifier) -> None:
    logits, alpha = classifier(padded(ROWS))
    assert (logits.shape, alpha.shape) == ((3, 3), (3, 5))
    for b, row in enumerate(ROWS):
        alone_logits, alone = classifier(torch.tensor([row]))
        torch.testing.assert_close(logits[b], alone_logits[0])
        torch.testing.assert_close(alpha[b, : len(row)], alone[0])
        assert alpha[b, len(row) :].eq(0).all()
    torch.testing.assert_close(alpha.sum(-1), torch.ones(3).double())


def test_classifier_gradients_ignore_padding(classifier: BiLSTMClassifier) -> None:
    def gradient(tokens: Tensor) -> list[Tensor]:
        logits, _ = classifier(tokens)
        return list(torch.autograd.grad(logits[0].square().sum(), list(classifier.parameters())))

    short, long = torch.tensor([ROWS[1]]), torch.tensor([[*ROWS[1], PAD, PAD]])
    for one, other in zip(gradient(short), gradient(long), strict=True):
        torch.testing.assert_close(one, other)


def test_classifier_signed_attention_in_closed_form(classifier: BiLSTMClassifier) -> None:
    """A_i = alpha_i (y - p) . W h_i, and sum_i A_i = (y - p) . (logits - b)."""
    tokens, target = padded(ROWS), torch.tensor([2, 0, 1])
    found = classifier.explain(tokens, target)
    logits, alpha = classifier(tokens)
    states, _ = classifier.encode(tokens)
    error = F.one_hot(target, 3) - logits.softmax(-1)
    closed = alpha * ((states @ classifier.head.weight.T) * error.unsqueeze(1)).sum(-1)
    torch.testing.assert_close(found.signed, closed.detach())
    torch.testing.assert_close(found.signed.sum(-1), (error * (logits - classifier.head.bias)).sum(-1).detach())
    torch.testing.assert_close(found.attention, alpha.detach())
    torch.testing.assert_close(found.probability, logits.softmax(-1)[range(3), target].detach())
    assert not found.signed.requires_grad
    assert not found.attention.requires_grad


def test_classifier_explain_is_signed_attention_of_its_output(classifier: BiLSTMClassifier) -> None:
    tokens = padded(ROWS)
    logits, alpha = classifier(tokens)
    found = classifier.explain(tokens)
    assert found.target.equal(logits.argmax(-1))
    loss = F.cross_entropy(logits, found.target, reduction="sum")
    torch.testing.assert_close(found.signed, signed_attention(alpha, loss))
    torch.testing.assert_close(found.signed, classifier.explain(tokens, found.target).signed)
    torch.testing.assert_close(classifier.explain(tokens, 1).signed, classifier.explain(tokens, torch.ones(3).long()).signed)


def test_explaining_needs_no_gradients_and_leaves_none(classifier: BiLSTMClassifier, translator: Seq2Seq) -> None:
    tokens = padded(ROWS)
    expected = classifier.explain(tokens).signed, translator.explain(tokens, padded(OUTPUTS)).signed
    for model in (classifier, translator):
        model.requires_grad_(False)
    with torch.no_grad():
        found = classifier.explain(tokens).signed, translator.explain(tokens, padded(OUTPUTS)).signed
    torch.testing.assert_close(found, expected)
    assert all(p.grad is None for model in (classifier, translator) for p in model.parameters())


def test_padding_alone_is_the_bias(classifier: BiLSTMClassifier) -> None:
    logits, alpha = classifier(torch.tensor([[4, 5], [PAD, PAD]]))
    torch.testing.assert_close(logits[1], classifier.head.bias)
    assert alpha[1].eq(0).all()
    found = classifier.explain(torch.tensor([[PAD, PAD]]))
    assert found.signed.eq(0).all()


def test_translator_padding_changes_nothing(translator: Seq2Seq) -> None:
    logits, alpha = translator(padded(ROWS), padded(OUTPUTS))
    assert (logits.shape, alpha.shape) == ((3, 4, 6), (3, 4, 5))
    for b, (row, output) in enumerate(zip(ROWS, OUTPUTS, strict=True)):
        alone_logits, alone = translator(torch.tensor([row]), torch.tensor([output]))
        torch.testing.assert_close(logits[b, : len(output)], alone_logits[0])
        torch.testing.assert_close(alpha[b, : len(output), : len(row)], alone[0])
        assert alpha[b, :, len(row) :].eq(0).all()


def test_translator_does_not_look_ahead(translator: Seq2Seq) -> None:
    source = torch.tensor([ROWS[0]])
    one, other = (translator(source, torch.tensor([output]))[0] for output in ([3, 4, 5], [3, 4, 3]))
    torch.testing.assert_close(one, other)
    changed = translator(source, torch.tensor([[5, 4, 5]]))[0]
    torch.testing.assert_close(changed[:, 0], one[:, 0])
    assert (changed[:, 1] - one[:, 1]).abs().max() > 1e-3


def test_greedy_agrees_with_teacher_forcing(translator: Seq2Seq) -> None:
    """Each token written is the likeliest after those before it; padding follows the end, with rows of zeros."""
    sources = torch.randint(3, 10, (40, 5))
    tokens, alpha = translator.greedy(sources, 6)
    logits, forced = translator(sources, tokens)
    written = tokens != PAD
    logits[..., PAD] = -torch.inf
    assert tokens[written].equal(logits.argmax(-1)[written])
    torch.testing.assert_close(alpha[written], forced[written].detach())
    assert alpha[~written].eq(0).all()
    ended = (tokens == EOS).cumsum(1) - (tokens == EOS).long() > 0
    assert ended.equal(~written)


def test_greedy_stops() -> None:
    model = Seq2Seq(10, 6, 4, 6)
    with torch.no_grad():
        model.head.bias[EOS] = 100
    tokens, alpha = model.greedy(padded(ROWS), 9)
    assert tokens.tolist() == [[EOS]] * 3
    assert alpha.shape == (3, 1, 5)
    with torch.no_grad():
        model.head.bias[PAD], model.head.bias[EOS] = 200, -100
    tokens, _ = model.greedy(padded(ROWS), 9)
    assert tokens.shape == (3, 9)
    assert tokens.ne(PAD).all()


def test_greedy_batch_equals_singles(translator: Seq2Seq) -> None:
    tokens, alpha = translator.greedy(padded(ROWS), 7)
    for b, row in enumerate(ROWS):
        alone, alone_alpha = translator.greedy(torch.tensor([row]), 7)
        assert tokens[b, : alone.shape[1]].equal(alone[0])
        torch.testing.assert_close(alpha[b, : alone.shape[1], : len(row)], alone_alpha[0])


def test_translator_rows_explain_their_own_token(translator: Seq2Seq) -> None:
    """Row t is the signed attention of the loss of token t alone."""
    source, target = padded(ROWS), padded(OUTPUTS)
    found = translator.explain(source, target)
    logits, alpha = translator(source, target)
    losses = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    for t in range(target.shape[1]):
        alone = signed_attention(alpha, losses[:, t].sum())
        written = target[:, t] != PAD
        torch.testing.assert_close(found.signed[written, t], alone[written, t])
    assert found.signed[target == PAD].eq(0).all()
    assert found.attention[target == PAD].eq(0).all()
    assert found.signed[source.eq(PAD).unsqueeze(1).expand_as(found.signed)].eq(0).all()
    likelihood = (-losses).exp().detach() * (target != PAD)
    torch.testing.assert_close(found.probability, likelihood)


def test_translator_explains_what_it_writes(translator: Seq2Seq) -> None:
    found = translator.explain(padded(ROWS), steps=5)
    tokens, alpha = translator.greedy(padded(ROWS), 5)
    assert found.target.equal(tokens)
    torch.testing.assert_close(found.attention, alpha)


CLASSIFIER, TRANSLATOR = BiLSTMClassifier(10, 4, 6, 3), Seq2Seq(10, 6, 4, 6)
TOKENS, TARGET = torch.tensor([[4, 5, 0]]), torch.tensor([[3, 4, EOS]])
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "one axis": (lambda: CLASSIFIER(TOKENS[0]), ValueError, "tokens: "),
    "no tokens": (lambda: CLASSIFIER(TOKENS[:, :0]), ValueError, "tokens: "),
    "floats": (lambda: CLASSIFIER(TOKENS.float()), TypeError, "tokens: "),
    "a list": (lambda: CLASSIFIER([[4]]), TypeError, "tokens: "),
    "unknown id": (lambda: CLASSIFIER(torch.tensor([[10]])), ValueError, "tokens: "),
    "negative id": (lambda: CLASSIFIER(torch.tensor([[-1]])), ValueError, "tokens: "),
    "padding first": (lambda: CLASSIFIER(torch.tensor([[0, 4]])), ValueError, "tokens: "),
    "class": (lambda: CLASSIFIER.explain(TOKENS, 3), ValueError, "target: "),
    "classes": (lambda: CLASSIFIER.explain(TOKENS, torch.tensor([0, 1])), ValueError, "target: "),
    "classes as floats": (lambda: CLASSIFIER.explain(TOKENS, torch.tensor([0.0])), TypeError, "target: "),
    "source": (lambda: TRANSLATOR(torch.tensor([[0, 4]]), TARGET), ValueError, "source: "),
    "target": (lambda: TRANSLATOR(TOKENS, torch.tensor([[3, 6]])), ValueError, "target: "),
    "target's batch": (lambda: TRANSLATOR(TOKENS, TARGET.repeat(2, 1)), ValueError, "target: "),
    "steps": (lambda: TRANSLATOR.greedy(TOKENS, 0), ValueError, "steps: "),
    "size": (lambda: BiLSTMClassifier(10, 0, 6, 3), ValueError, "dim: "),
    "vocabulary": (lambda: Seq2Seq(10, 0, 4, 6), ValueError, "target_vocab: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_line_says_what_is_wrong(name: str) -> None:
    call, kind, start = WRONG[name]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


def test_special_tokens_differ() -> None:
    assert len({PAD, BOS, EOS}) == 3
