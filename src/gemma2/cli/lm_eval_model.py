"""`--model gemma2` of lm-eval's command line. Importing this module registers it there."""

from __future__ import annotations

import sys
from typing import Any, Final

from lm_eval.api.registry import register_model

from gemma2.api import load
from gemma2.errors import ConfigError, nearest_name
from gemma2.evaluation.lm_eval import DEFAULT_MAX_GEN_TOKS, HarnessModel

MODEL_ARGS: Final = (
    "pretrained",
    "adapter",
    "backend",
    "weights",
    "kv_cache",
    "threads",
    "revision",
    "max_length",
    "max_gen_toks",
)
LM_EVAL_DEFAULT_DEVICE: Final = "cuda:0"


@register_model("gemma2")
class Gemma2LM(HarnessModel):
    """Loads a model for lm-eval.

    Args:
        pretrained: a folder, or a name on the Hub that was pulled; the bundled model if left out.
        adapter: as for `gemma2.load`.
        backend: as for `gemma2.load`.
        weights: as for `gemma2.load`.
        kv_cache: as for `gemma2.load`.
        threads: of the CPU engine; one for each core if left out.
        device: lm-eval's --device, as for `gemma2.load`; "cuda:0", its default on any machine, means the best there is.
        revision: as for `gemma2.load`.
        max_length: as for `HarnessModel`.
        max_gen_toks: as for `HarnessModel`.
        batch_size: lm-eval's; has no effect, as the engine fills its steps itself.
        max_batch_size: likewise.
        **unknown: refused.

    Raises:
        Gemma2Error: an argument is unknown or out of range, or the model cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        adapter: str | None = None,
        backend: str = "auto",
        weights: str = "auto",
        kv_cache: str = "auto",
        threads: int | None = None,
        device: str | None = None,
        revision: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = DEFAULT_MAX_GEN_TOKS,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            raise ConfigError(
                f"--model_args {name}=… is not known; gemma2 takes {', '.join(MODEL_ARGS)}."
                f"{nearest_name(name, MODEL_ARGS)}"
            )
        llm = load(
            None if pretrained is None else str(pretrained),  # lm-eval makes a number of a folder called 7
            adapter=None if adapter is None else str(adapter),
            backend=backend,
            weights=weights,
            kv_cache=kv_cache,
            num_threads=threads,
            device=None if device == LM_EVAL_DEFAULT_DEVICE else device,
            revision=None if revision is None else str(revision),
            notify=lambda sentence: print(sentence, file=sys.stderr),
        )
        super().__init__(llm, max_length=max_length, max_gen_toks=max_gen_toks)
