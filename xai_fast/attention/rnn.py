"""Two small recurrent networks with additive attention that explain what they do: a classifier and an encoder-decoder."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..ops import _checks as check
from .additive import AdditiveAttention, attend
from .signed import signed_attention

__all__ = ["BOS", "EOS", "PAD", "AttentionExplanation", "BiLSTMClassifier", "Seq2Seq"]

# Token ids with a meaning: padding in both models; begin and end of an output in the encoder-decoder.
PAD, BOS, EOS = 0, 1, 2


class AttentionExplanation(NamedTuple):
    """What a model attended to, and which of it spoke for the target.

    Attributes
    ----------
    target : Tensor, shape (B,) or (B, T)
        The classes or the output tokens that are explained.
    probability : Tensor, shaped like target
        The model's for the target; 0 at padding.
    attention : Tensor, shape (B, S) or (B, T, S)
        Plain attention: at least 0, rows sum to 1, whatever the target.
    signed : Tensor, shaped like attention
        Signed attention :math:`-\\alpha_i\\,\\partial L / \\partial \\alpha_i` with the cross-entropy L of the target:
        positive speaks for the target, negative against it. Row t of an encoder-decoder explains output token t.

    Examples
    --------
    >>> import torch
    >>> from xai_fast.attention.rnn import BiLSTMClassifier
    >>> found = BiLSTMClassifier(vocab=10, dim=4, hidden=8, classes=2).explain(torch.tensor([[5, 6, 7]]), target=0)
    >>> found.target, found.attention.shape
    (tensor([0]), torch.Size([1, 3]))
    """

    target: Tensor
    probability: Tensor
    attention: Tensor
    signed: Tensor


class BiLSTMClassifier(nn.Module):
    """Embedding, a bidirectional LSTM, self-attentive pooling, and a linear layer.

    .. math:: \\mathrm{logits} = W \\sum_i \\alpha_i h_i + b

    Parameters
    ----------
    vocab : int
        Number of token ids; 0 (`PAD`) is padding.
    dim : int
        Of the embeddings.
    hidden : int
        Of the LSTM in each direction, and of the attention.
    classes : int

    Raises
    ------
    TypeError, ValueError
        Sizes that are no whole numbers of at least 1.

    Notes
    -----
    As the logits are linear in the weights, signed attention with cross-entropy has the closed form
    :math:`A_i = \\alpha_i (y - p)^\\top W h_i` for one-hot y and probabilities p.

    Source: Lin et al. (2017), arXiv 1703.03130, with one hop; the model of Serrano & Smith (2019) and Jain & Wallace (2019).

    Examples
    --------
    >>> import torch
    >>> from xai_fast.attention.rnn import BiLSTMClassifier
    >>> model = BiLSTMClassifier(vocab=10, dim=4, hidden=8, classes=2)
    >>> found = model.explain(torch.tensor([[5, 6, 7], [8, 9, 0]]), target=1)
    >>> found.signed.shape, found.attention[1, 2].item()
    (torch.Size([2, 3]), 0.0)
    """

    def __init__(self, vocab: int, dim: int, hidden: int, classes: int) -> None:
        super().__init__()
        _check_sizes(vocab=vocab, dim=dim, hidden=hidden, classes=classes)
        self.embed = nn.Embedding(vocab, dim, padding_idx=PAD)
        self.rnn = nn.LSTM(dim, hidden, batch_first=True, bidirectional=True)
        self.attention = AdditiveAttention(2 * hidden, None, hidden)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Classify.

        Parameters
        ----------
        tokens : int64 Tensor, shape (B, S)
            Padded at the end.

        Returns
        -------
        logits : Tensor, shape (B, classes)
        alpha : Tensor, shape (B, S)
            With its graph; exactly 0 at padding.

        Raises
        ------
        TypeError, ValueError
            Tokens of another type or shape, or with padding before the end.
        """
        states, mask = self.encode(tokens)
        context, alpha = self.attention(states, None, mask)
        return self.head(context), alpha

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The states h_i (B, S, 2 hidden), zero at padding, and the mask (B, S) that keeps the others."""
        _check_tokens(tokens, "tokens", self.embed.num_embeddings)
        states, _ = _run(self.rnn, self.embed(tokens), tokens)
        return states, tokens != PAD

    def explain(self, tokens: Tensor, target: Tensor | int | None = None) -> AttentionExplanation:
        """Plain and signed attention of every token.

        Parameters
        ----------
        tokens : int64 Tensor, shape (B, S)
        target : int64 Tensor of shape (B,), int, optional
            Classes to explain. Default: the predicted ones.

        Returns
        -------
        AttentionExplanation

        Raises
        ------
        TypeError, ValueError
            As of a call; targets of another shape, or that are no classes.
        """
        with torch.no_grad():
            states, mask = self.encode(tokens)
            alpha = self.attention.weights(states, None, mask)
        # The graph begins at the weights: nothing before them is differentiated.
        with torch.enable_grad():
            alpha.requires_grad_()
            logits = self.head(attend(alpha, states))
            chosen = _classes(target, logits)
            losses = F.cross_entropy(logits, chosen, reduction="none")
            signed = signed_attention(alpha, losses, retain_graph=False)
        return AttentionExplanation(chosen, losses.detach().neg().exp(), alpha.detach(), signed)


class Seq2Seq(nn.Module):
    """Bidirectional GRU encoder, GRU decoder, additive attention from the decoder's states to the encoder's.

    .. math:: \\alpha_t = \\mathrm{softmax}_i(v^\\top \\tanh(W_h h_i + W_q s_t + b)), \\qquad
              \\mathrm{logits}_t = W_o \\tanh(W_c [s_t; \\textstyle\\sum_i \\alpha_{ti} h_i])

    Parameters
    ----------
    source_vocab, target_vocab : int
        Numbers of token ids; 0 (`PAD`) is padding, and in the output 1 (`BOS`) the begin and 2 (`EOS`) the end.
    dim : int
        Of the embeddings.
    hidden : int
        Of the encoder in each direction, of the decoder, and of the attention.

    Raises
    ------
    TypeError, ValueError
        Sizes that are no whole numbers of at least 1.

    Notes
    -----
    The scores are those of Bahdanau, Cho & Bengio (2015), arXiv 1409.0473. As in Luong et al. (2015), arXiv 1508.04025,
    section 3.1, the decoder's state s_t attends after its step and the context is not fed back: one call attends for all
    output tokens, and row t of the weights changes nothing but output t.

    Examples
    --------
    >>> import torch
    >>> from xai_fast.attention.rnn import Seq2Seq
    >>> model = Seq2Seq(source_vocab=10, target_vocab=6, dim=4, hidden=8)
    >>> source, target = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[3, 4, 2], [5, 2, 0]])
    >>> logits, alpha = model(source, target)
    >>> logits.shape, alpha.shape
    (torch.Size([2, 3, 6]), torch.Size([2, 3, 3]))
    >>> model.explain(source, target).signed.shape
    torch.Size([2, 3, 3])
    """

    def __init__(self, source_vocab: int, target_vocab: int, dim: int, hidden: int) -> None:
        super().__init__()
        _check_sizes(source_vocab=source_vocab, target_vocab=target_vocab, dim=dim, hidden=hidden)
        self.embed_source = nn.Embedding(source_vocab, dim, padding_idx=PAD)
        self.embed_target = nn.Embedding(target_vocab, dim, padding_idx=PAD)
        self.encoder = nn.GRU(dim, hidden, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(2 * hidden, hidden)
        self.decoder = nn.GRU(dim, hidden, batch_first=True)
        self.attention = AdditiveAttention(2 * hidden, hidden, hidden)
        self.combine = nn.Linear(3 * hidden, hidden)
        self.head = nn.Linear(hidden, target_vocab)

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Predict each token of an output from the input and the tokens before it (teacher forcing).

        Parameters
        ----------
        source : int64 Tensor, shape (B, S)
            Padded at the end.
        target : int64 Tensor, shape (B, T)
            Without `BOS`, with `EOS`, padded at the end.

        Returns
        -------
        logits : Tensor, shape (B, T, target_vocab)
        alpha : Tensor, shape (B, T, S)
            With its graph; exactly 0 at the padding of the input.

        Raises
        ------
        TypeError, ValueError
            Tokens of another type or shape, or with padding before the end.
        """
        states, mask, first = self.encode(source)
        decoded = self._decode_all(first, self._check_target(target, len(source)))
        context, alpha = self.attention(states, decoded, mask)
        return self._logits(decoded, context), alpha

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The states (B, S, 2 hidden), zero at padding, the mask (B, S), and the decoder's first state (1, B, hidden)."""
        _check_tokens(source, "source", self.embed_source.num_embeddings)
        states, last = _run(self.encoder, self.embed_source(source), source)
        return states, source != PAD, self.bridge(last.transpose(0, 1).flatten(1)).tanh().unsqueeze(0)

    @torch.no_grad()
    def greedy(self, source: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The likeliest next token, again and again.

        Parameters
        ----------
        source : int64 Tensor, shape (B, S)
        steps : int
            The most tokens to write, `EOS` included.

        Returns
        -------
        tokens : int64 Tensor, shape (B, T)
            T of at most `steps`; `PAD` after `EOS`.
        alpha : Tensor, shape (B, T, S)
            0 in the rows of padding.

        Raises
        ------
        TypeError, ValueError
            As of a call; steps that are no whole number of at least 1.
        """
        steps = check.check_count(steps, "steps")
        states, mask, state = self.encode(source)
        token = torch.full_like(source[:, :1], BOS)
        done = torch.zeros_like(token, dtype=torch.bool)
        tokens, rows = [], []
        for _ in range(steps):
            decoded, state = self.decoder(self.embed_target(token), state)
            context, alpha = self.attention(states, decoded, mask)
            logits = self._logits(decoded, context)
            logits[..., PAD] = -torch.inf
            token = logits.argmax(-1).masked_fill(done, PAD)
            tokens.append(token)
            rows.append(alpha.masked_fill(done.unsqueeze(-1), 0))
            done = done | (token == EOS)
            if done.all():
                break
        return torch.cat(tokens, 1), torch.cat(rows, 1)

    def explain(self, tokens: Tensor, target: Tensor | None = None, *, steps: int = 64) -> AttentionExplanation:
        """Plain and signed attention of every output token for every input token.

        Parameters
        ----------
        tokens : int64 Tensor, shape (B, S)
            The inputs.
        target : int64 Tensor, shape (B, T), optional
            The outputs to explain. Default: those of `greedy`.
        steps : int
            For `greedy`.

        Returns
        -------
        AttentionExplanation
            Rows of padding are 0.

        Raises
        ------
        TypeError, ValueError
            As of a call.
        """
        if target is None:
            target = self.greedy(tokens, steps)[0]
        with torch.no_grad():
            states, mask, first = self.encode(tokens)
            decoded = self._decode_all(first, self._check_target(target, len(tokens)))
            written = (target != PAD).unsqueeze(-1)
            alpha = self.attention.weights(states, decoded, mask).masked_fill(~written, 0)
        with torch.enable_grad():
            alpha.requires_grad_()
            logits = self._logits(decoded, attend(alpha, states))
            losses = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=PAD, reduction="none")
            signed = signed_attention(alpha, losses, retain_graph=False)
        probability = losses.detach().neg().exp() * written.squeeze(-1)
        return AttentionExplanation(target, probability, alpha.detach(), signed)

    def _decode_all(self, first: Tensor, target: Tensor) -> Tensor:
        """The decoder's states (B, T, hidden), each from the tokens before its own."""
        before = F.pad(target, (1, 0), value=BOS)[:, :-1]
        return self.decoder(self.embed_target(before), first)[0]

    def _logits(self, decoded: Tensor, context: Tensor) -> Tensor:
        return self.head(self.combine(torch.cat([decoded, context], -1)).tanh())

    def _check_target(self, target: Any, batch: int) -> Tensor:
        _check_tokens(target, "target", self.embed_target.num_embeddings)
        if len(target) != batch:
            raise ValueError(f"target: expected {batch} sequences, one for each of the source, got {len(target)}")
        return target


def _run(rnn: nn.RNNBase, embedded: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """States (B, S, D) and the last hidden state (2, B, hidden); padding neither is read nor has a state."""
    # A sequence of padding alone counts as one token: packing takes no empty ones. Nothing attends to it.
    lengths = (tokens != PAD).sum(1).clamp_min(1).cpu()
    packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
    output, last = rnn(packed)
    states, _ = pad_packed_sequence(output, batch_first=True, total_length=tokens.shape[1])
    return states, last[0] if isinstance(last, tuple) else last


def _classes(target: Tensor | int | None, logits: Tensor) -> Tensor:
    """Classes (B,) to explain."""
    if target is None:
        return logits.detach().argmax(-1)
    batch, classes = logits.shape
    chosen = target if isinstance(target, Tensor) else torch.full((batch,), check.check_count(target, "target", 0))
    if chosen.dtype != torch.int64:
        raise TypeError(f"target: expected an int64 tensor or an int, got {chosen.dtype}")
    if tuple(chosen.shape) != (batch,):
        raise ValueError(f"target: expected shape ({batch},), got {check.shape_of(chosen)}")
    if batch and not 0 <= int(chosen.min()) <= int(chosen.max()) < classes:
        raise ValueError(f"target: expected classes from 0 to {classes - 1}, got {chosen.tolist()}")
    return chosen.to(logits.device)


def _check_tokens(tokens: Any, name: str, vocab: int) -> None:
    """int64 (B, S) with ids of the vocabulary, padding only at the end."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name}: expected an int64 tensor, got {got}")
    if tokens.dim() != 2 or 0 in tokens.shape:
        raise ValueError(f"{name}: expected shape (B, S) with B and S of at least 1, got {check.shape_of(tokens)}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise ValueError(f"{name}: expected ids from 0 to {vocab - 1}, got {low if low < 0 else high}")
    if bool(((tokens[:, :-1] == PAD) & (tokens[:, 1:] != PAD)).any()):
        raise ValueError(f"{name}: expected padding (id {PAD}) only at the end of a sequence, got it before a token")


def _check_sizes(**sizes: Any) -> None:
    for name, size in sizes.items():
        check.check_count(size, name)
