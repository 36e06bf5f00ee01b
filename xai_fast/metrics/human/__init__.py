"""Human evaluation: forms that ask people about explanations, and the scores of their answers.

Two questions of Selvaraju et al. 2017 (Grad-CAM), section 5: which class does an explanation explain, and which of two
models do explanations make more trustworthy? The forms are single HTML files without a server; see `build_form` and `score`.
"""

from .forms import Form, build_form
from .questions import AttentionCheck, ClassQuestion, ColoredText, TrustQuestion
from .scoring import Answer, HumanScore, HumanScores, read_answers, score

__all__ = [
    "Answer",
    "AttentionCheck",
    "ClassQuestion",
    "ColoredText",
    "Form",
    "HumanScore",
    "HumanScores",
    "TrustQuestion",
    "build_form",
    "read_answers",
    "score",
]
