"""Requests, the scheduler, and the loop that turns prompts into text.

Read in this order: `engine`, `request`, `scheduler`, `stopping`, `scoring`.
"""

from gemma2.generation.engine import Engine, Prompt
from gemma2.generation.request import Completion, FinishReason, Request, RequestStatus, TextDelta
from gemma2.generation.scheduler import Schedule, Scheduler
from gemma2.generation.scoring import ContinuationScore, ScoringTask, score_continuations
from gemma2.generation.stopping import StopStrings

__all__ = [
    "Completion",
    "ContinuationScore",
    "Engine",
    "FinishReason",
    "Prompt",
    "Request",
    "RequestStatus",
    "Schedule",
    "Scheduler",
    "ScoringTask",
    "StopStrings",
    "TextDelta",
    "score_continuations",
]
