"""Explanations of a sentence classifier, judged: MiniLM with its intents, five methods on tokens, all measures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xai_fast import capture_attention, lrp
from xai_fast.metrics.explainers import gradient_times_input

from ..models.intents import IntentClassifier, Intents
from .measuring import (
    ATTNLRP,
    GRADIENT,
    GRADIENT_INPUT,
    RANDOM,
    ROLLOUT,
    Effort,
    Explain,
    Judged,
    joined,
    judge,
    random_like,
)

__all__ = ["SENTENCES", "JudgedTexts", "WordsClassifier", "by_length", "judge_texts", "text_explainers"]

# Written for this page; with the intent that is meant.
SENTENCES = (
    ("I lost my credit card and need to report it", "report lost card"),
    ("Please freeze my savings account right away", "freeze account"),
    ("Someone used my card for a purchase I never made", "report fraud"),
    ("My card was declined at the grocery store", "card declined"),
    ("How long until my replacement card arrives?", "replacement card duration"),
    ("I want to change the pin of my account", "pin change"),
    ("What is the routing number of my bank?", "routing"),
    ("How much money do I have in checking?", "balance"),
    ("Transfer fifty dollars to my savings account", "transfer"),
    ("When is my electricity bill due?", "bill due"),
    ("Pay my water bill from checking", "pay bill"),
    ("What is the minimum payment on my visa?", "min payment"),
    ("Can you raise my credit limit to 3000 dollars?", "credit limit change"),
    ("What is my credit score at the moment?", "credit score"),
    ("How do I improve my credit score?", "improve credit score"),
    ("Show me my recent transactions", "transactions"),
    ("How much did I spend on coffee last month?", "spending history"),
    ("What is the exchange rate between euros and dollars?", "exchange rate"),
    ("How many reward points do I have?", "rewards balance"),
    ("When does my paycheck come?", "payday"),
    ("Book me a flight from Boston to Denver on Friday", "book flight"),
    ("Is my flight to Chicago on time?", "flight status"),
    ("The airline lost my luggage in Madrid", "lost luggage"),
    ("I need a hotel room in Seattle for two nights", "book hotel"),
    ("Rent a car for me in Miami next week", "car rental"),
    ("Do I need a visa to travel to Brazil?", "international visa"),
    ("Which vaccines do I need before a trip to Kenya?", "vaccines"),
    ("What kind of plug do they use in Italy?", "plug type"),
    ("How do you say good morning in Japanese?", "translate"),
    ("Call me an uber to the train station", "uber"),
    ("How is the traffic on the way to work?", "traffic"),
    ("Give me directions to the nearest library", "directions"),
    ("How far is it to the airport?", "distance"),
    ("Will it rain in London tomorrow?", "weather"),
    ("What time is it in Tokyo right now?", "time"),
    ("Wake me up at six tomorrow morning", "alarm"),
    ("Set a timer for ten minutes", "timer"),
    ("Remind me to call my sister on Sunday", "reminder"),
    ("Add eggs and butter to my shopping list", "shopping list update"),
    ("Schedule a meeting with the sales team at noon", "schedule meeting"),
    ("How many vacation days do I have left?", "pto balance"),
    ("Find me a recipe for lemon cake", "recipe"),
    ("How many calories are in a banana?", "calories"),
    ("Can I use honey instead of sugar?", "ingredient substitution"),
    ("How long should I cook a chicken in the oven?", "cook time"),
    ("Reserve a table for four at the steak house", "restaurant reservation"),
    ("Does that restaurant have good reviews?", "restaurant reviews"),
    ("What song is playing right now?", "what song"),
    ("Skip to the next song please", "next song"),
    ("Turn up the volume of the speakers", "change volume"),
    ("Tell me a joke about penguins", "tell joke"),
    ("Flip a coin for me", "flip coin"),
    ("How do I change the oil of my car?", "oil change how"),
    ("What is the pressure in my tires?", "tire pressure"),
    ("Please connect me to a real person", "connect to human"),
    ("I cannot find my phone anywhere", "find phone"),
)


class WordsClassifier(nn.Module):
    """The intent classifier as a function of the embeddings of the tokens between [CLS] and [SEP], which stay.

    Parameters
    ----------
    classifier : IntentClassifier
    first, last : int
        Ids of [CLS] and [SEP].

    Examples
    --------
    >>> from xai_fast.demo.models.intents import load_intents
    >>> model = WordsClassifier(load_intents().model, 101, 102)  # doctest: +SKIP
    >>> model(model.embed(torch.tensor([[7592]]))).shape  # doctest: +SKIP
    torch.Size([1, 157])
    """

    def __init__(self, classifier: IntentClassifier, first: int, last: int) -> None:
        super().__init__()
        self.backbone, self.head = classifier.backbone, classifier.head
        self.table: Tensor = classifier.backbone.get_parameter("embeddings.word_embeddings.weight").detach()
        self.first, self.last = self.table[None, None, first], self.table[None, None, last]

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings (B, N, D) of token ids (B, N)."""
        return self.table[ids]

    def forward(self, words: Tensor) -> Tensor:
        """Logits (B, classes) of embeddings (B, N, D)."""
        first, last = (edge.expand(len(words), 1, -1) for edge in (self.first, self.last))
        embedded = torch.cat([first, words, last], dim=1)
        states = self.backbone(inputs_embeds=embedded).last_hidden_state
        return self.head(F.normalize(states.mean(dim=1), dim=-1))


@dataclass(frozen=True)
class JudgedTexts:
    """The judged sentences: how many, their tokens, how many intents are those meant, and the mean probability of them."""

    sentences: int
    tokens: tuple[int, int]
    right: int
    probability: float
    judged: Judged
    effort: Effort


def text_explainers(model: WordsClassifier) -> dict[str, Explain]:
    """The methods as ``explain(words, target)``, maps (B, N): one value per token between [CLS] and [SEP].

    The embedding is the mean over all tokens, so rollout and targeted relevance are means over their rows, the latter
    without what every token has of itself through the skip connections.

    Parameters
    ----------
    model : WordsClassifier

    Examples
    --------
    >>> list(text_explainers(model))  # doctest: +SKIP
    ['Rollout', 'Targeted, gradient', 'AttnLRP', 'Gradient x input', 'Random']
    """

    def rollout(words: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad(), capture_attention(model) as record:
            model(words)
        return record.rollout(token=None).mean(1)[:, 1:-1]

    def targeted(words: Tensor, target: Tensor) -> Tensor:
        # Gradients must flow for the capture to see them: no parameter of a frozen model asks for any.
        with capture_attention(model) as record:
            logits = model(words.detach().requires_grad_())
        rows = record.relevance(logits.gather(1, target[:, None])[:, 0], token=None).detach()
        others = (rows - torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)).clamp_min(0)
        return others.mean(1)[:, 1:-1]

    def attnlrp(words: Tensor, target: Tensor) -> Tensor:
        return lrp.attribute(model, words, target).sum(-1)

    def gradient_input(words: Tensor, target: Tensor) -> Tensor:
        return gradient_times_input(model).maps(words, target).sum(-1)

    def random(words: Tensor, target: Tensor) -> Tensor:
        return random_like(words, words.shape[1:2])

    return {ROLLOUT: rollout, GRADIENT: targeted, ATTNLRP: attnlrp, GRADIENT_INPUT: gradient_input, RANDOM: random}


def by_length(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places of the rows of each length, the shortest first: what can run as one batch without padding.

    Examples
    --------
    >>> by_length([[5, 6], [7], [8, 9]])
    [[1], [0, 2]]
    """
    places = defaultdict(list)
    for place, row in enumerate(rows):
        places[len(row)].append(place)
    return [places[length] for length in sorted(places)]


def judge_texts(
    intents: Intents,
    effort: Effort,
    *,
    most: int | None = None,
    device: torch.device | None = None,
    tick: Callable[[int], object] = lambda _: None,
) -> JudgedTexts:
    """Explain the intent that the classifier predicts for every sentence, and measure; [MASK] is the baseline.

    Parameters
    ----------
    intents : Intents
    effort : Effort
    most : int, optional
        Only so many sentences.
    device : torch.device, optional
    tick : callable
        Called with the number of sentences of every length once they are done.

    Examples
    --------
    >>> from xai_fast.demo.models.intents import load_intents
    >>> judge_texts(load_intents(), Effort((0.5,), 5, 10, 2), most=4).sentences  # doctest: +SKIP
    4
    """
    device = device or torch.device("cpu")
    tokenizer, chosen = intents.tokenizer, SENTENCES[:most]
    model = WordsClassifier(intents.model.to(device), tokenizer.cls_token_id, tokenizer.sep_token_id).eval()
    rows = [tokenizer(sentence, add_special_tokens=False).input_ids for sentence, _ in chosen]
    mask = model.embed(torch.tensor([[tokenizer.mask_token_id]], device=device))
    explainers = text_explainers(model)
    parts, right, total = [], 0, 0.0
    for places in by_length(rows):
        words = model.embed(torch.tensor([rows[place] for place in places], device=device))
        with torch.no_grad():
            probabilities, targets = model(words).softmax(1).max(1)
        meant = [chosen[place][1] for place in places]
        right += sum(intents.names[t] == name for t, name in zip(targets.tolist(), meant, strict=True))
        total += float(probabilities.sum())
        parts.append(judge(explainers, model, words, effort, baseline=mask))
        tick(len(places))
    lengths = [len(row) for row in rows]
    return JudgedTexts(len(rows), (min(lengths), max(lengths)), right, total / len(rows), joined(parts), effort)
