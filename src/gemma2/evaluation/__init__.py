"""How well a model predicts text."""

from gemma2.evaluation.text_score import TextScore, score_texts

__all__ = ["TextScore", "score_texts"]
