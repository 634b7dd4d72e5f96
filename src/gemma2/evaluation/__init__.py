"""How well a model predicts text.

Read in this order: `windows`, `texts`, `text_score`. `lm_eval` is apart: it is imported by those who have lm-eval.
"""

from gemma2.evaluation.text_score import TextScore, score_texts, score_windows
from gemma2.evaluation.texts import EncodedText, FileText, encode_text, read_texts
from gemma2.evaluation.windows import SlidingWindow, Window

__all__ = [
    "EncodedText",
    "FileText",
    "SlidingWindow",
    "TextScore",
    "Window",
    "encode_text",
    "read_texts",
    "score_texts",
    "score_windows",
]
