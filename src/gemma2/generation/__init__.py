"""Requests, the scheduler, and the loop that turns prompts into text.

Read in this order: `engine`, `request`, `scheduler`, `stopping`, `scoring`.
"""

from gemma2.generation.engine import Engine, Prompt
from gemma2.generation.request import Completion, FinishReason, Request, RequestStatus, TextDelta
from gemma2.generation.scheduler import Schedule, Scheduler
from gemma2.generation.stopping import StopStrings

__all__ = [
    "Completion",
    "Engine",
    "FinishReason",
    "Prompt",
    "Request",
    "RequestStatus",
    "Schedule",
    "Scheduler",
    "StopStrings",
    "TextDelta",
]
