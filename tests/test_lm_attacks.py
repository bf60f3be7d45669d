"""Attacks on language models: PGD on embeddings against closed forms, substitutions against all there are."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from drsl_kernels.robustness.lm import GPT, Shape, embedding_pgd, mean_embedding_norm, substitute_tokens
from drsl_kernels.robustness.lm.judging import LanguageJudging, Point, _embedding, _substitution

pytestmark = pytest.mark.usefixtures("one_thread")

V, T = 9, 6


@pytest.fixture
def model() -> GPT:
    """Of float64, with large weights, so that its predictions are far from even."""
    gpt = GPT(Shape(V, context=T, layers=1, heads=1, width=4), seed=2).double()
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return gpt


def sequences(count: int = 5) -> Tensor:
    return torch.randint(V, (count, T + 1), generator=torch.Generator().manual_seed(0))


class Linear:
    """Two tokens, whose log-odds are linear in the vector of the token before: what PGD finds can be written down."""

    def __init__(self) -> None:
        self.table = torch.randn(2, 3).double()
        self.weight = torch.tensor([0.5, -2.0, 1.0]).double()

    def embed(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]

    def hidden(self, vectors: Tensor) -> Tensor:
        return vectors

    def scores(self, hidden: Tensor) -> Tensor:
        one = hidden @ self.weight
        return torch.stack([torch.zeros_like(one), one], dim=-1)


@pytest.mark.parametrize("loss", ["log_odds", "ce", "margin"])
@pytest.mark.parametrize(("norm", "dual"), [("l2", 2), ("linf", 1)])
def test_pgd_finds_the_optimum_of_a_linear_model(norm: Any, dual: int, loss: Any) -> None:
    toy, x = Linear(), torch.randint(2, (7, 9))
    found = embedding_pgd(toy, x, eps=0.3, alpha=3.0, steps=20, loss=loss, norm=norm)
    delta = (toy.embed(x[:, :-1]) @ toy.weight) * (1 - 2 * x[:, 1:])  # the other token's logit over the target's
    worst = delta + 0.3 * toy.weight.norm(dual)
    torch.testing.assert_close(found.nats, F.softplus(worst).sum(1))
    torch.testing.assert_close(found.correct, (worst < 0).sum(1))


@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("linf", math.inf)])
def test_pgd_stays_in_the_ball_of_each_token(model: GPT, norm: Any, order: float) -> None:
    x = sequences()
    clean = embedding_pgd(model, x, eps=0.0, steps=0, random_start=False)
    generator = torch.Generator().manual_seed(3)
    found = embedding_pgd(model, x, eps=0.4, steps=8, norm=norm, restarts=2, generator=generator)
    moved = torch.linalg.vector_norm(found.vectors - model.embed(x[:, :-1]), order, dim=-1)
    assert float(moved.detach().max()) <= 0.4 * (1 + 1e-12)
    assert float(moved.detach().min()) > 0.1  # every token is moved, not the sequence as one
    assert bool((found.nats > clean.nats + 0.5).all())
    # What is told of the points is what the model makes of them.
    log_p = model.scores(model.hidden(found.vectors)).log_softmax(-1)
    nats = -log_p.gather(2, x[:, 1:].unsqueeze(2)).sum((1, 2))
    torch.testing.assert_close(found.nats, nats.detach())
    assert bool((found.correct <= (log_p.argmax(-1) == x[:, 1:]).sum(1)).all())
    # It repeats itself, and leaves the model as it was.
    again = embedding_pgd(model, x, eps=0.4, steps=8, norm=norm, restarts=2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.vectors, found.vectors)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_pgd_keeps_the_worst_of_all_points(model: GPT) -> None:
    """The text as it is, too: a random point in the ball is often a better one."""
    x = sequences(30)
    clean = embedding_pgd(model, x, eps=0.0, steps=0, random_start=False).nats
    found = [
        embedding_pgd(model, x, eps=0.4, steps=0, restarts=n, generator=torch.Generator().manual_seed(3)).nats
        for n in (1, 2, 5)
    ]
    assert 0 < int((found[0] == clean).sum()) < 30
    for fewer, more in pairwise([clean, *found]):
        assert bool((more >= fewer).all())
        assert bool((more > fewer).any())


def test_pgd_tells_the_worst_of_every_point_it_visits(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    x, scores_of = sequences(64), GPT.scores
    nats, correct = [], []

    def watched(self: GPT, hidden: Tensor) -> Tensor:
        scores = scores_of(self, hidden)
        log_p = scores.detach().log_softmax(-1)
        nats.append(-log_p.gather(2, x[:, 1:].unsqueeze(2)).sum((1, 2)))
        correct.append((log_p.argmax(-1) == x[:, 1:]).sum(1))
        return scores

    monkeypatch.setattr(GPT, "scores", watched)
    found = embedding_pgd(model, x, eps=0.1, steps=3, restarts=3, generator=torch.Generator().manual_seed(0))
    assert len(nats) == 1 + 3 * (3 + 1)
    every, right = torch.stack(nats), torch.stack(correct)
    torch.testing.assert_close(found.nats, every.amax(0).double())
    assert torch.equal(found.correct, right.amin(0))
    assert not torch.equal(right.amin(0), right.gather(0, every.argmax(0, keepdim=True))[0]), "of other points"


def test_log_odds_see_what_saturation_hides() -> None:
    """Cross-entropy below float32's smallest number has no gradient; the log-odds have."""

    class Sure(Linear):
        def scores(self, hidden: Tensor) -> Tensor:
            return (300 * super().scores(hidden.double())).float()

    toy = Sure()
    toy.table = torch.tensor([[-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    x = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])  # each is sure of itself
    kept = {
        loss: embedding_pgd(toy, x, eps=0.6, steps=20, loss=loss, random_start=False).correct.tolist()  # type: ignore[arg-type]
        for loss in ("log_odds", "ce")
    }
    assert kept == {"log_odds": [0, 0], "ce": [3, 3]}


def test_mean_embedding_norm(model: GPT) -> None:
    rows = model.embedding.weight[[1, 4, 7]].detach()
    assert mean_embedding_norm(model, torch.tensor([4, 1, 7, 4])) == pytest.approx(rows.norm(dim=1).mean().item())


def continuation(model: GPT, x: Tensor, prefix: int) -> Tensor:
    """-log p of the tokens behind the prefix, (N,), by the textbook."""
    log_p = model(x[:, :-1]).log_softmax(-1)
    return -log_p.gather(2, x[:, 1:].unsqueeze(2)).squeeze(2)[:, prefix - 1 :].sum(1).detach()


@pytest.mark.parametrize("proposal", ["hotflip", "gcg", "random"])
def test_substitutions_touch_the_beginning_alone_and_never_help(model: GPT, proposal: Any) -> None:
    x, allowed = sequences(12), torch.ones(V, dtype=torch.bool)
    allowed[[2, 5]] = False
    found = substitute_tokens(
        model,
        x,
        prefix=4,
        substitutions=3,
        candidates=6,
        proposal=proposal,
        allowed=allowed,
        generator=torch.Generator().manual_seed(1),
    )
    changed = found.sequences != x
    assert not bool(changed[:, 4:].any())
    assert bool(changed.any())
    assert int(changed.sum(1).max()) <= 3
    assert bool(allowed[found.sequences[changed]].all())
    assert bool((found.nats.diff(dim=0) >= 0).all())
    torch.testing.assert_close(found.nats[0], continuation(model, x, 4))
    torch.testing.assert_close(found.nats[3], continuation(model, found.sequences, 4))
    right = model(found.sequences[:, :-1]).argmax(-1)[:, 3:] == x[:, 4:]
    assert bool((found.correct[3] <= right.sum(1)).all())
    assert bool((found.correct.diff(dim=0) <= 0).all())
    assert found.scored == T + 1 - 4


def test_one_substitution_of_all_that_there_are(model: GPT) -> None:
    """With a candidate for every place and token what is found is the worst of them."""
    x = sequences(64)
    found = substitute_tokens(model, x, prefix=2, substitutions=1, candidates=2 * V, proposal="hotflip")
    nats, correct = [found.nats[0]], [found.correct[0]]
    for place in range(2):
        for token in range(V):
            other = x.clone()
            other[:, place] = token
            nats.append(continuation(model, other, 2))
            correct.append((model(other[:, :-1]).argmax(-1)[:, 1:] == x[:, 2:]).sum(1))
    every, right = torch.stack(nats), torch.stack(correct)
    torch.testing.assert_close(found.nats[1], every.amax(0))
    assert torch.equal(found.correct[1], right.amin(0))
    assert not torch.equal(right.amin(0), right.gather(0, every.argmax(0, keepdim=True))[0]), "of other candidates"


def test_with_all_candidates_the_best_exchange_is_found(model: GPT) -> None:
    """Of each sequence every single exchange is tried by hand."""
    x, prefix = sequences(4), 3
    found = substitute_tokens(model, x, prefix=prefix, substitutions=1, candidates=prefix * V)
    for i, row in enumerate(x):
        every = []
        for place, token in product(range(prefix), range(V)):
            other = row.clone()
            other[place] = token
            every.append(other)
        values = continuation(model, torch.stack(every), prefix)
        torch.testing.assert_close(found.nats[1, i], values.max())


def test_a_place_is_exchanged_once(model: GPT) -> None:
    x = sequences(40)
    rounds = [substitute_tokens(model, x, prefix=3, substitutions=k, candidates=1).sequences for k in range(4)]
    for before, after in pairwise(rounds):
        moved = before != after
        assert bool(moved.any())
        assert torch.equal(before[moved], x[moved])


def test_the_gradient_beats_chance_with_few_candidates() -> None:
    """On a model whose loss is linear in the vectors, one candidate of hotflip is the best exchange."""

    class Sum(Linear):
        def hidden(self, vectors: Tensor) -> Tensor:
            return vectors.cumsum(1)

        def embed(self, tokens: Tensor) -> Tensor:
            return torch.linspace(-1, 1, 9)[tokens].double().unsqueeze(-1) * torch.tensor([1.0, 0.0, 0.0]).double()

        def scores(self, hidden: Tensor) -> Tensor:
            return F.pad(super().scores(hidden), (0, 7), value=-math.inf)

    toy, x = Sum(), torch.tensor([[4, 4, 4, 4, 1, 1, 1], [4, 4, 4, 4, 0, 0, 0]])
    found = substitute_tokens(toy, x, prefix=4, substitutions=3, candidates=1)
    assert sorted(found.sequences[0, :4].tolist()) == [0, 0, 0, 4]
    assert sorted(found.sequences[1, :4].tolist()) == [4, 8, 8, 8]


def test_worst_cases_never_rise_with_the_size_and_are_the_worst(model: GPT) -> None:
    judging = LanguageJudging(radii=(0.1, 0.5), budgets=(1, 3), steps=3, restarts=1, candidates=5)
    x = sequences(6)
    embedding = _embedding(model, x, judging, 2.0, (0, 0), lambda name: None)
    substitution = _substitution(model, x, judging, torch.ones(V, dtype=torch.bool), (0, 0), lambda name: None)
    assert embedding.keys() == {"pgd:log_odds", "pgd:ce", "worst"}
    assert substitution.keys() == {"hotflip", "gcg", "random", "worst"}
    for found, sizes in ((embedding, [0.0, 0.1, 0.5]), (substitution, [0.0, 1.0, 3.0])):
        assert [point.size for point in found["worst"]] == sizes
        for name, points in found.items():
            nats = [point.nats for point in points]
            assert nats == sorted(nats)
            assert all(a.nats >= b.nats for a, b in zip(found["worst"], points, strict=True)), name
    assert Point(1.0, 6 * math.log(5.0), 2, 6).perplexity == pytest.approx(5.0)


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"eps": -1.0}, "eps must be 0 or more"),
            ({"steps": -1}, "steps must be 0 or more"),
            ({"loss": "dlr"}, "loss must be one of 'log_odds', 'ce', 'margin', got 'dlr'"),
            ({"norm": "l1"}, "norm must be one of"),
            (
                {"sequences": torch.zeros(3, 1, dtype=torch.int64)},
                r"shape \(N, T \+ 1\) with T of 1 or more, got \(3, 1\)",
            ),
        ],
    )
    def test_of_pgd(self, model: GPT, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            embedding_pgd(model, **{"sequences": sequences(), "eps": 0.1} | changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prefix": 7}, "prefix must be from 1 to T = 6, got 7"),
            ({"prefix": 0}, "prefix must be from 1 to T = 6, got 0"),
            ({"substitutions": 4}, "substitutions must be from 0 to prefix = 3, got 4"),
            ({"candidates": 0}, "candidates must be 1 or more, got 0"),
            ({"proposal": "best"}, "proposal must be one of 'hotflip', 'gcg', 'random', got 'best'"),
            ({"allowed": torch.zeros(9, dtype=torch.bool)}, "allow a token"),
            ({"allowed": torch.ones(4, dtype=torch.bool)}, r"shape \(V,\) = \(9,\)"),
        ],
    )
    def test_of_substitution(self, model: GPT, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            substitute_tokens(model, sequences(), **{"prefix": 3, "substitutions": 1} | changes)

    def test_of_judging(self) -> None:
        with pytest.raises(ValueError, match="radii must be above 0 and finite"):
            LanguageJudging(radii=(0.0,))
        with pytest.raises(ValueError, match="proposals must be some of hotflip, gcg, random"):
            LanguageJudging(proposals=("guess",))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="budgets must be at most half of the context, 3, got 8 substitutions"):
            LanguageJudging().check_context(6)

    def test_a_broken_model_is_no_robust_one(self, model: GPT) -> None:
        with torch.no_grad():
            model.norm.weight.fill_(math.nan)
        with pytest.raises(FloatingPointError, match="not finite"):
            embedding_pgd(model, sequences(), eps=0.1)
        with pytest.raises(FloatingPointError, match="not finite"):
            substitute_tokens(model, sequences(), prefix=3, substitutions=1)

    def test_tokens_of_another_type(self, model: GPT) -> None:
        with pytest.raises(TypeError, match=r"sequences must be a Tensor of tokens, int64, got torch\.float32"):
            embedding_pgd(model, torch.zeros(2, 3), eps=0.1)
