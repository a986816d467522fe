"""The divergences in pieces equal the plain formulas over whole matrices, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmasos.train import divergence, losses
from llmasos.train.divergence import Divergence, Kind, Scores, cosine_distance, linear_divergence

N, D, E, V = 29, 24, 40, 301
KINDS: tuple[Kind, ...] = ("forward_kl", "reverse_kl", "jsd")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scores(width: int, words: int, device: torch.device, *, bias: bool, scale: float, cap: float) -> Scores:
    parts = [torch.randn(N, width), torch.randn(words, width) * 0.4, torch.randn(words) if bias else None]
    return Scores(*(None if p is None else p.to(device) for p in parts), scale=scale, softcap=cap)  # type: ignore[arg-type]


def logits(one: Scores) -> torch.Tensor:
    x = F.linear(one.hidden, one.weight, one.bias) * one.scale
    return torch.tanh(x / one.softcap) * one.softcap if one.softcap else x


def plain(student: Scores, teacher: Scores, labels: torch.Tensor, options: Divergence) -> torch.Tensor:
    ours, theirs = logits(student), logits(teacher)
    shared, t = min(ours.shape[1], theirs.shape[1]), options.temperature
    q, p = (F.softmax(x[:, :shared] / t, -1) for x in (ours, theirs))

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum()

    m = options.beta * p + (1 - options.beta) * q
    found = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": options.beta * kl(p, m) + (1 - options.beta) * kl(q, m),
    }[options.kind]
    return (1 - options.weight) * F.cross_entropy(ours, labels, reduction="sum") + options.weight * found * t**2


def doubled(one: Scores, *, learns: bool) -> tuple[Scores, list[torch.Tensor]]:
    parts = [p.detach().double().requires_grad_(learns) for p in (one.hidden, one.weight, one.bias) if p is not None]
    return Scores(*parts, scale=one.scale, softcap=one.softcap), parts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("weight", "temperature", "beta"), [(1.0, 1.0, 0.5), (0.3, 2.5, 0.2), (0.7, 0.8, 0.9)])
@pytest.mark.parametrize(
    ("words", "their_words", "bias", "scale", "cap"),
    [(V, V, False, 1.0, 0.0), (V, V + 19, True, 0.5, 4.0), (V + 19, V, True, 1.0, 0.0), (V, V, False, 2.0, 3.0)],
)
def test_values_and_gradients_are_those_of_the_plain_formula(
    kind: Kind,
    weight: float,
    temperature: float,
    beta: float,
    words: int,
    their_words: int,
    bias: bool,
    scale: float,
    cap: float,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Different widths; the teacher has a bias, a scale and a cap that are not the student's."""
    monkeypatch.setattr(losses, "PIECE", 10 * (words + their_words + 128))  # three pieces, the last one not full
    monkeypatch.setattr(divergence, "BLOCK", 10 * 70)  # several blocks of columns, the last one not full
    torch.manual_seed(0)
    student = scores(D, words, device, bias=bias, scale=scale, cap=cap)
    teacher = scores(E, their_words, device, bias=not bias, scale=0.8, cap=0.0 if cap else 6.0)
    labels = torch.randint(min(words, their_words), (N,), device=device)
    options = Divergence(kind, beta, temperature, weight)
    exact, expected_parts = doubled(student, learns=True)
    expected = plain(exact, doubled(teacher, learns=False)[0], labels, options)
    mine = [p for p in (student.hidden, student.weight, student.bias) if p is not None]
    for part in mine:
        part.requires_grad_()
    found = linear_divergence(student, teacher, labels, options)
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-5, atol=1e-5)
    total = (1 - weight) * found.cross_entropy + weight * found.divergence
    torch.testing.assert_close(total, found.loss.detach(), rtol=1e-6, atol=1e-6)
    (found.loss * 0.25).backward()
    (expected * 0.25).backward()
    for a, b in zip(mine, expected_parts, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


def test_products_in_bfloat16_give_gradients_in_bfloat16_near_the_exact_ones(device: torch.device) -> None:
    torch.manual_seed(0)
    student, teacher = (scores(w, V, device, bias=False, scale=1.0, cap=0.0) for w in (D, E))
    labels, options = torch.randint(V, (N,), device=device), Divergence("jsd", 0.5, 2.0, 0.5)
    exact, [hidden, weight] = doubled(student, learns=True)
    expected = plain(exact, doubled(teacher, learns=False)[0], labels, options)
    expected.backward()
    low = [p.bfloat16().requires_grad_() for p in (student.hidden, student.weight)]
    found = linear_divergence(
        Scores(*low), Scores(teacher.hidden.bfloat16(), teacher.weight.bfloat16()), labels, options
    )
    found.loss.backward()
    assert found.loss.dtype == torch.float32 and abs(float((found.loss / expected).detach()) - 1) < 0.02
    for a, b in zip(low, (hidden, weight), strict=True):
        assert a.grad is not None and b.grad is not None and a.grad.dtype == torch.bfloat16
        assert float((a.grad.double() - b.grad).norm() / b.grad.norm()) < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(kind: Kind, device: torch.device) -> None:
    torch.manual_seed(0)
    one = scores(D, V, device, bias=True, scale=1.0, cap=5.0)
    hidden = one.hidden.clone().requires_grad_()
    labels = torch.randint(V, (N,), device=device)
    found = linear_divergence(
        Scores(hidden, one.weight, one.bias, softcap=5.0), one, labels, Divergence(kind, temperature=3.0)
    )
    found.loss.backward()
    assert abs(float(found.divergence)) < 1e-4 and hidden.grad is not None and float(hidden.grad.abs().max()) < 1e-5
    assert float(found.cross_entropy) > 1.0


def test_extreme_logits_stay_numbers(device: torch.device) -> None:
    """Probabilities that are zero in float32 contribute nothing, and nothing becomes NaN."""
    torch.manual_seed(0)
    student, teacher = (scores(w, V, device, bias=False, scale=300.0, cap=0.0) for w in (D, E))
    labels = torch.randint(V, (N,), device=device)
    for kind in KINDS:
        hidden = student.hidden.clone().requires_grad_()
        found = linear_divergence(
            Scores(hidden, student.weight, scale=300.0), teacher, labels, Divergence(kind, weight=0.5)
        )
        found.loss.backward()
        assert found.loss.isfinite() and hidden.grad is not None and hidden.grad.isfinite().all()


def test_nothing_trained_gives_nothing_and_gradients_of_zero(device: torch.device) -> None:
    hidden = torch.randn(0, D, device=device, requires_grad=True)
    weight = torch.randn(V, D, device=device, requires_grad=True)
    teacher = Scores(torch.randn(0, E, device=device), torch.randn(V, E, device=device))
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    found = linear_divergence(Scores(hidden, weight), teacher, nothing, Divergence())
    found.loss.backward()
    assert found.loss == 0 and weight.grad is not None and not weight.grad.any()


def test_no_more_than_a_piece_of_logits_exists_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, by counting what `linear` gives and what is in float32 over the vocabulary."""
    monkeypatch.setattr(losses, "PIECE", 4096)
    monkeypatch.setattr(divergence, "BLOCK", 512)
    sizes: list[int] = []
    linear = F.linear

    def counted(*args: torch.Tensor) -> torch.Tensor:
        found = linear(*args)
        sizes.append(found.numel())
        return found

    bent = divergence._bent
    blocks: list[int] = []

    def seen(x: torch.Tensor, one: Scores) -> tuple[torch.Tensor, torch.Tensor | None]:
        blocks.append(x.numel())
        return bent(x, one)

    monkeypatch.setattr(F, "linear", counted)
    monkeypatch.setattr(divergence, "_bent", seen)
    device = torch.device("cpu")
    student, teacher = (scores(w, V, device, bias=False, scale=1.0, cap=0.0) for w in (D, E))
    linear_divergence(student, teacher, torch.zeros(N, dtype=torch.int64), Divergence("jsd"))
    assert max(sizes) <= 4096 and len(sizes) > 6 and max(blocks) <= 512


def test_the_distance_of_hidden_states_is_one_minus_their_cosine() -> None:
    ours = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    theirs = torch.tensor([[5.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    assert float(cosine_distance(ours, theirs)) == pytest.approx(0 + 2 + (1 - 0.5**0.5), abs=1e-6)
