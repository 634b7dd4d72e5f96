"""New weights from old ones, tensor by tensor: adapters folded in, and averages of several models.

    fold      W' = W + s · B A, for one adapter after another
    linear    Σ wᵢ Wᵢ                                                     Wortsman et al., arXiv 2203.05482
    slerp     along the arc between two weights: sin((1-t)Ω)/sin Ω · W₀ + sin(tΩ)/sin Ω · W₁, Ω the angle between them

The report averages the weights of several runs (section 4, citing WARP, arXiv 2406.16768). WARP's arcs are between the
changes that tuning made to one base model; with a base, averages are of the changes W - base, and are added to it.
More than two models go along arcs one after the other, each with its share of the weight so far.

The head is the embedding, one tensor, so it stays tied whatever is done. Sums are float32; one tensor of each model is
in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from gemma2.checkpoints.adapters import Adapter
from gemma2.checkpoints.checkpoint import Checkpoint
from gemma2.checkpoints.layout import first_few
from gemma2.errors import CheckpointError

Method = Literal["linear", "slerp"]
_PARALLEL: Final = 1e-4
"""Below this angle an arc is a line, and its formula 0 / 0."""

Floats = npt.NDArray[np.float32]


def folded_tensors(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yields (name, array) of a model with adapters folded in: float32 where one changes it, else as it is stored.

    Args:
        checkpoint: the model.
        adapters: what is folded in, one after the other.
    """
    for name, tensor in checkpoint.tensors.items():
        updates = [adapter.updates[name] for adapter in adapters if name in adapter.updates]
        array = tensor.numpy()
        if updates:
            array = array.astype(np.float32)
            for update in updates:
                array = update.apply(array)
        yield name, array


def averaged_tensors(
    checkpoints: Sequence[Checkpoint],
    *,
    weights: Sequence[float] | None = None,
    method: Method = "linear",
    base: Checkpoint | None = None,
) -> Iterator[tuple[str, Floats]]:
    """Yields (name, array) of the average of models of one architecture, in float32.

    Args:
        checkpoints: two models or more.
        weights: the share of each; they are divided by their sum. Left out, all are alike.
        method: see above.
        base: the model that all were tuned from; averages are then of what tuning changed.

    Raises:
        CheckpointError: the models are not of one architecture, or the weights are not as many, negative or all 0.
    """
    shares = _shares(checkpoints, weights)
    everyone = [*checkpoints, *([base] if base is not None else [])]
    for other in everyone[1:]:
        different = [
            name for name, value in other.config.to_dict().items() if everyone[0].config.to_dict().get(name) != value
        ]
        if different:
            raise CheckpointError(
                f"{other.folder} is of another architecture than {everyone[0].folder}: {first_few(different)} differ; "
                "only models of one architecture can be averaged"
            )
    return _averaged(checkpoints, shares, method, base)


def _averaged(
    checkpoints: Sequence[Checkpoint], shares: list[float], method: Method, base: Checkpoint | None
) -> Iterator[tuple[str, Floats]]:
    for name in checkpoints[0].tensors:
        origin = None if base is None else base.tensors[name].numpy().astype(np.float32)
        average: Floats | None = None
        so_far = 0.0
        for checkpoint, share in zip(checkpoints, shares, strict=True):
            if share == 0:
                continue
            values = checkpoint.tensors[name].numpy().astype(np.float32)
            if origin is not None:
                values -= origin
            so_far += share
            if average is None:
                average = values
            elif method == "slerp":
                average = _along_arc(average, values, share / so_far)
            else:
                average += np.float32(share / so_far) * (values - average)
        assert average is not None
        yield name, average if origin is None else origin + average


def _along_arc(first: Floats, second: Floats, t: float) -> Floats:
    a, b = first.reshape(-1).astype(np.float64), second.reshape(-1).astype(np.float64)
    lengths = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    angle = float(np.arccos(np.clip(float(a @ b) / lengths, -1.0, 1.0))) if lengths else 0.0
    if angle < _PARALLEL or np.pi - angle < _PARALLEL:  # no arc, or no one arc
        left, right = 1 - t, t
    else:
        left, right = np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)
    return (left * a + right * b).astype(np.float32).reshape(first.shape)


def _shares(checkpoints: Sequence[Checkpoint], weights: Sequence[float] | None) -> list[float]:
    if len(checkpoints) < 2:
        raise CheckpointError(f"an average needs two models or more, but {len(checkpoints)} came")
    if weights is None:
        return [1 / len(checkpoints)] * len(checkpoints)
    if len(weights) != len(checkpoints):
        raise CheckpointError(f"{len(checkpoints)} models need as many weights, but {len(weights)} came")
    if not all(np.isfinite(weights)) or min(weights) < 0 or sum(weights) == 0:
        raise CheckpointError(f"weights must be numbers of at least 0, not all 0, but are {list(weights)}")
    return [weight / sum(weights) for weight in weights]
