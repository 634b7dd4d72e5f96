"""Divergences in chunks against autograd on the whole; what is stored of a teacher; limits and mistakes."""

from __future__ import annotations

import math

import pytest
import torch
from small_model import LargestTensor, batch_of, packed_row, small_model
from torch import Tensor

from gemma2.errors import ConfigError
from gemma2.training.distillation import (
    Divergence,
    Teacher,
    TeacherLogits,
    TeacherTopK,
    distillation_objective,
    linear_divergence,
    most_probable,
    teacher_from_hidden,
    torch_teacher,
)
from gemma2.training.head_loss import IGNORE_INDEX

CAP, TEACHER_CAP = 3.0, 4.0
KINDS = [
    Divergence(),
    Divergence(temperature=2.0, hard_label_weight=0.25),
    Divergence(kind="reverse_kl"),
    Divergence(kind="jsd", beta=0.2, temperature=0.5),
]


class Inputs:
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(19, 8, dtype=dtype, generator=generator).requires_grad_()
        self.embedding = torch.randn(37, 8, dtype=dtype, generator=generator).requires_grad_()
        self.teacher_hidden = torch.randn(19, 6, dtype=dtype, generator=generator)
        self.teacher_embedding = torch.randn(37, 6, dtype=dtype, generator=generator)
        self.labels = torch.randint(0, 37, (19,), generator=generator)
        self.labels[[0, 4, 18]] = IGNORE_INDEX

    @property
    def teacher(self) -> TeacherLogits:
        return teacher_from_hidden(self.teacher_hidden, self.teacher_embedding, cap=TEACHER_CAP)

    def teacher_logits(self) -> Tensor:
        return TEACHER_CAP * torch.tanh(self.teacher_hidden @ self.teacher_embedding.t() / TEACHER_CAP)

    def student_logits(self) -> Tensor:
        return CAP * torch.tanh(self.hidden @ self.embedding.t() / CAP)

    def stored(self, num_words: int, temperature: float = 1.0) -> TeacherTopK:
        words = most_probable(self.teacher, torch.arange(19), num_words, vocab_size=37, temperature=temperature)
        return TeacherTopK(ids_TK=words[0], log_probs_TK=words[1], rest_T=words[2])

    def loss(self, teacher: Teacher, divergence: Divergence, chunk_size: int = 7) -> Tensor:
        return linear_divergence(
            self.hidden,
            self.embedding,
            self.labels,
            teacher,
            cap=CAP,
            divergence=divergence,
            chunk_size=chunk_size,
        )

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss * 0.7, [self.hidden, self.embedding])


def between(p: Tensor, q: Tensor, divergence: Divergence) -> Tensor:
    """The divergence of the rows of two matrices of probabilities, by the book."""
    if divergence.kind == "forward_kl":
        return (p * (p / q).log()).sum()
    if divergence.kind == "reverse_kl":
        return (q * (q / p).log()).sum()
    m = divergence.beta * p + (1 - divergence.beta) * q
    return divergence.beta * (p * (p / m).log()).sum() + (1 - divergence.beta) * (q * (q / m).log()).sum()


def plain(inputs: Inputs, divergence: Divergence, num_words: int | None = None) -> Tensor:
    """The loss on the whole logits; of `num_words` words and the rest as one if given."""
    rows = inputs.labels != IGNORE_INDEX
    student, teacher = inputs.student_logits()[rows], inputs.teacher_logits()[rows]
    p, q = (torch.softmax(logits / divergence.temperature, dim=1) for logits in (teacher, student))
    if num_words is not None:
        order = p.argsort(dim=1, descending=True)
        p, q = (
            torch.cat([x.gather(1, order)[:, :num_words], x.gather(1, order)[:, num_words:].sum(1, keepdim=True)], 1)
            for x in (p, q)
        )
    hard = torch.nn.functional.cross_entropy(student, inputs.labels[rows], reduction="sum")
    soft = divergence.temperature**2 * between(p, q, divergence)
    return (1 - divergence.hard_label_weight) * soft + divergence.hard_label_weight * hard


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("chunk_size", [1, 7, 100])
def test_equals_the_whole_loss_and_its_gradients(divergence: Divergence, chunk_size: int) -> None:
    inputs = Inputs()
    expected, loss = plain(inputs, divergence), inputs.loss(inputs.teacher, divergence, chunk_size)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(inputs.gradients(loss), inputs.gradients(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("num_words", [1, 5, 36])
def test_stored_words_and_the_rest_as_one(divergence: Divergence, num_words: int) -> None:
    inputs = Inputs()
    expected = plain(inputs, divergence, num_words)
    loss = inputs.loss(inputs.stored(num_words, divergence.temperature), divergence)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(inputs.gradients(loss), inputs.gradients(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", KINDS)
def test_all_words_stored_are_the_teacher_itself(divergence: Divergence) -> None:
    inputs = Inputs()
    whole = inputs.loss(inputs.teacher, divergence)
    loss = inputs.loss(inputs.stored(37, divergence.temperature), divergence)
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(inputs.gradients(loss), inputs.gradients(whole), rtol=1e-9, atol=1e-12)


def test_fewer_words_say_less() -> None:
    """What is stored bounds the divergence over all words from below."""
    inputs = Inputs()
    losses = [inputs.loss(inputs.stored(count), Divergence()).item() for count in (1, 4, 16, 37)]
    assert losses == sorted(losses) and losses[0] < 0.9 * losses[-1]


def test_the_jsd_divided_by_beta_goes_to_the_kullback_leibler_divergences() -> None:
    inputs = Inputs()
    forward, reverse = (
        inputs.loss(inputs.teacher, Divergence(kind=kind)).item() for kind in ("forward_kl", "reverse_kl")
    )
    for beta, expected in ((1e-6, forward), (1 - 1e-6, reverse)):
        loss = inputs.loss(inputs.teacher, Divergence(kind="jsd", beta=beta)).item()
        assert loss / min(beta, 1 - beta) == pytest.approx(expected, rel=1e-3)
    for beta, expected in ((0.0, forward), (1.0, reverse)):
        assert inputs.loss(inputs.teacher, Divergence(kind="jsd", beta=beta)).item() == expected


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    inputs = Inputs()
    teacher = teacher_from_hidden(inputs.hidden, inputs.embedding, cap=CAP)
    for divergence in (Divergence(), Divergence(kind="reverse_kl"), Divergence(kind="jsd", temperature=3.0)):
        loss = inputs.loss(teacher, divergence)
        assert abs(loss.item()) < 1e-12
        assert max(float(gradient.abs().max()) for gradient in inputs.gradients(loss)) < 1e-12


def test_certain_words_give_finite_losses() -> None:
    """A teacher that stored no rest, and a student that is sure of another word."""
    inputs = Inputs(torch.float32)
    with torch.no_grad():
        inputs.embedding *= 100.0
    stored = TeacherTopK(ids_TK=torch.full((19, 1), 3), log_probs_TK=torch.zeros(19, 1), rest_T=torch.zeros(19))
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        for cap in (CAP, None):
            loss = linear_divergence(
                inputs.hidden,
                inputs.embedding,
                inputs.labels,
                stored,
                cap=cap,
                divergence=Divergence(kind=kind),  # type: ignore[arg-type]
            )
            assert math.isfinite(loss.item())
            assert all(bool(gradient.isfinite().all()) for gradient in inputs.gradients(loss))


def test_teachers_of_all_kinds_agree() -> None:
    """Hidden states, capped logits from anywhere, another dtype."""
    inputs = Inputs()
    expected = inputs.loss(inputs.teacher, Divergence()).item()
    capped = inputs.teacher_logits()
    assert inputs.loss(TeacherLogits(at=lambda rows: capped[rows], cap=None), Divergence()).item() == pytest.approx(
        expected, rel=1e-12
    )
    narrow = TeacherLogits(at=lambda rows: capped[rows].float(), cap=None)
    assert inputs.loss(narrow, Divergence()).item() == pytest.approx(expected, rel=1e-5)


def test_only_trained_tokens_are_asked_for() -> None:
    inputs = Inputs()
    asked: list[int] = []
    capped = inputs.teacher_logits()

    def at(rows: Tensor) -> Tensor:
        asked.extend(rows.tolist())
        return capped[rows]

    with LargestTensor(37) as largest:
        inputs.loss(TeacherLogits(at=at, cap=None), Divergence(), chunk_size=5).backward()  # type: ignore[no-untyped-call]
    assert asked == [place for place in range(19) if place not in (0, 4, 18)]
    assert largest.num_rows <= 5


def test_the_objective_is_the_same_packed_or_separate() -> None:
    student, teacher = small_model(), torch_teacher(small_model(seed=1), compute_dtype=torch.float64)
    objective = distillation_objective(teacher=teacher, divergence=Divergence(kind="jsd"), compute_dtype=torch.float64)
    packed = packed_row(9, 14, padding=2)
    whole = objective(student, batch_of(packed)).item()
    parts = 0.0
    for segment in (1, 2):
        piece = packed_row(9, 14, padding=2)
        piece.labels[piece.segment_ids != segment] = IGNORE_INDEX
        parts += objective(student, batch_of(piece)).item()
    assert whole == pytest.approx(parts, rel=1e-12)


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"no divergence 'forward-kl'; .* Did you mean 'forward_kl'\?"):
        Divergence(kind="forward-kl")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="temperature must be above 0, but is 0"):
        Divergence(temperature=0.0)
    with pytest.raises(ConfigError, match=r"beta must be from 0 to 1, but is 1\.5"):
        Divergence(beta=1.5)
    with pytest.raises(ConfigError, match="hard_label_weight must be from 0 to 1, but is nan"):
        Divergence(hard_label_weight=math.nan)
    inputs = Inputs()
    other = TeacherLogits(at=lambda rows: torch.zeros(len(rows), 36), cap=None)
    with pytest.raises(ValueError, match=r"logits of 6 tokens for the student's 37 words, but gives \(6, 36\)"):
        inputs.loss(other, Divergence())
