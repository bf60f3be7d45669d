"""Language models: the text and its parts, tokens, causality, losses and perplexity against the formulas."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from truth import loss_and_gradient

from drsl_kernels.robustness.lm import (
    GPT,
    BPETokens,
    ByteTokens,
    LanguageLoss,
    Score,
    Shape,
    Text,
    continued,
    drawn_windows,
    load_corpus,
    read_text,
    windows,
)
from drsl_kernels.robustness.lm.corpus import make_tokens
from drsl_kernels.robustness.lm.losses import LANGUAGE_LOSSES

pytestmark = pytest.mark.usefixtures("one_thread")

SENTENCES = "".join(f"line {i}: the cat éats {i * i} fish, and the dog does not\n" for i in range(400)).encode()


def small(head: str = "linear", **changes: object) -> GPT:
    shape = {"vocabulary": 11, "context": 12, "layers": 2, "heads": 2, "width": 8, "head": head, "components": 3}
    return GPT(Shape(**shape | changes), seed=1).double()  # type: ignore[arg-type]


class TestText:
    def test_parts_are_contiguous_and_end_with_lines(self) -> None:
        text = Text.of(SENTENCES, "here")
        assert text.train + text.validation + text.test == SENTENCES
        assert text.train.endswith(b"\n")
        assert text.validation.endswith(b"\n")
        assert len(text.train) / len(SENTENCES) == pytest.approx(0.9, abs=0.01)
        assert len(text.validation) / len(SENTENCES) == pytest.approx(0.05, abs=0.01)

    def test_no_character_is_cut_where_there_are_no_lines(self) -> None:
        text = Text.of("é".encode() * 1001, "here")
        for part in (text.train, text.validation, text.test):
            assert set(part.decode()) == {"é"}

    def test_files_of_a_folder_in_order(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        for name, content in (("b/x.txt", b"second"), ("a.txt", b"first\n"), ("c.txt", b"third\n")):
            (tmp_path / name).write_bytes(content)
        text = read_text(tmp_path)
        assert text.train + text.validation + text.test == b"first\nsecond\nthird\n"
        assert text.source == f"the 3 files of {tmp_path}"

    def test_the_standard_library(self) -> None:
        text = read_text("stdlib")
        assert len(text.train) > 10**6
        assert b"import" in text.test
        assert read_text("stdlib").digest == text.digest

    def test_what_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"there is no text '.*absent': give a file, a folder, or 'stdlib'"):
            read_text(tmp_path / "absent")
        with pytest.raises(FileNotFoundError, match="there is no text ''"):
            read_text("")
        (tmp_path / "empty").write_bytes(b"\n")
        with pytest.raises(ValueError, match="is empty"):
            read_text(tmp_path / "empty")


class TestTokens:
    def test_bytes_and_back(self) -> None:
        everything = bytes(range(256))
        assert ByteTokens().decode(ByteTokens().encode(everything)) == everything
        assert ByteTokens().encode(b"").shape == (0,)

    def test_bpe_and_back(self, tmp_path: Path) -> None:
        text = Text.of(SENTENCES, "here")
        tokens = make_tokens("bpe", text, 300, tmp_path)
        found = tokens.encode(text.test)
        assert tokens.vocabulary == 300
        assert tokens.decode(found) == text.test
        assert len(found) < len(text.test) / 2
        assert int(tokens.byte_lengths()[found].sum()) == len(text.test)
        # Characters that the training part has not are bytes, and nothing is lost.
        strange = "\N{SNOWMAN}\t\0 x".encode()
        assert tokens.decode(tokens.encode(strange)) == strange
        again = make_tokens("bpe", text, 300, tmp_path)
        assert again.digest == tokens.digest == BPETokens.load(tmp_path / "tokenizer.json").digest
        assert make_tokens("bpe", text, 280, tmp_path).vocabulary == 280

    def test_bpe_learns_from_the_training_part_alone(self, tmp_path: Path) -> None:
        text = Text(b"", SENTENCES, b"zzzz" * 1000, b"qqqq" * 1000)  # type: ignore[arg-type]
        tokens = make_tokens("bpe", text, 300, tmp_path)
        assert len(tokens.encode(text.test)) == len(text.test)

    def test_what_bpe_refuses(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"byte 2 of a part is b'\\xff'; tokens 'bytes' take any file"):
            BPETokens.train(b"ab\xff", 300)
        with pytest.raises(ValueError, match="vocabulary must be 256 or more, got 10"):
            BPETokens.train(b"ab", 10)
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(ValueError, match="is no tokenizer"):
            BPETokens.load(tmp_path / "tokenizer.json")


class TestWindows:
    def test_every_token_but_the_first_is_predicted_once(self) -> None:
        found = windows(torch.arange(30), 7)
        assert found[:, 1:].flatten().tolist() == list(range(1, 29))
        assert found[:, 0].tolist() == [0, 7, 14, 21]
        assert windows(torch.arange(30), 7, most=2)[:, 0].tolist() == [0, 21]

    def test_drawn_windows_depend_on_their_place_alone(self) -> None:
        tokens = torch.arange(50)
        found = drawn_windows(tokens, 7, 400, 3, "windows", 5)
        assert torch.equal(found, drawn_windows(tokens, 7, 400, 3, "windows", 5))
        assert not torch.equal(found, drawn_windows(tokens, 7, 400, 3, "windows", 6))
        assert set(found[:, 0].tolist()) == set(range(43))
        assert torch.equal(found - found[:, :1], torch.arange(8).expand(400, 8))

    def test_a_text_that_is_too_short(self) -> None:
        with pytest.raises(ValueError, match="context must be below the tokens of each part"):
            load_corpus(Text.of(b"abc\n" * 30, "here"), ByteTokens(), context=10)


@pytest.mark.parametrize("head", ["linear", "sigsoftmax", "mixture_of_softmax", "mixture_of_sigsoftmax"])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_later_token_changes_no_earlier_prediction(head: str, positions: str) -> None:
    model = small(head, positions=positions)
    tokens = torch.randint(11, (2, 12))
    before = model(tokens)
    for place in range(12):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 11
        after = model(changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place])
        if place < 11:  # and every later one sees it
            assert bool((after[:, place + 1 :] != before[:, place + 1 :]).any(-1).all())


def test_positions_tell_orders_apart() -> None:
    """Without them attention sees a set: the last place could not tell two orders of what came before."""
    for positions in ("rotary", "learned"):
        model = small(positions=positions)
        a, b = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 1, 3, 4]])
        assert (model(a)[0, -1] - model(b)[0, -1]).abs().max() > 1e-6


def test_rotary_attention_sees_differences_of_positions() -> None:
    rotary = small().blocks[0].attention.rotary
    query, key = torch.randn(4).double(), torch.randn(4).double()
    products = rotary(query.expand(1, 1, 12, 4)) @ rotary(key.expand(1, 1, 12, 4)).mT
    for shift in range(-11, 12):
        diagonal = products[0, 0].diagonal(shift)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-6)
    assert products[0, 0, 0].std() > 1e-3


def probabilities(model: GPT, tokens: Tensor) -> Tensor:
    """Of the next token, (N, T, V), by the formula of each head."""
    hidden = model.hidden(model.embed(tokens))
    weight = model.embedding.weight
    if model.shape.head == "linear":
        return (hidden @ weight.T).softmax(-1)
    if model.shape.head == "sigsoftmax":
        z = hidden @ weight.T
        return z.exp() * z.sigmoid() / (z.exp() * z.sigmoid()).sum(-1, keepdim=True)
    head = model.head
    contexts = head.latent(hidden).tanh().unflatten(-1, (3, 8))
    z = contexts @ weight.T
    parts = z.exp() * (z.sigmoid() if model.shape.head == "mixture_of_sigsoftmax" else 1)
    parts = parts / parts.sum(-1, keepdim=True)
    return (head.prior(hidden).softmax(-1).unsqueeze(-1) * parts).sum(-2)


@pytest.mark.parametrize("name", LANGUAGE_LOSSES)
def test_losses_and_their_gradients(name: str) -> None:
    loss = LanguageLoss.named(name)
    model = small(loss.head)
    tokens, y = torch.randint(11, (3, 5)), torch.randint(11, (3, 5))
    value = model(tokens, y, loss)
    got = torch.autograd.grad(value, model.embedding.weight)[0]
    p = probabilities(model, tokens).flatten(0, 1)
    if name == "label_smoothing":
        target = 0.9 * torch.nn.functional.one_hot(y.flatten(), 11) + 0.1 / 11
        want = -(target * p.log()).sum(1).mean()
    elif loss.tau:
        logits = (model.hidden(model.embed(tokens)) @ model.embedding.weight.T).flatten(0, 1)
        textbook, upstream, *_ = loss_and_gradient(logits, y.flatten(), distance=name, tau=loss.tau)
        torch.testing.assert_close(value.detach(), textbook.to(value.dtype))
        want = (logits * upstream).sum()  # its gradient is the textbook's, led through the model
        (expected,) = torch.autograd.grad(want, model.embedding.weight)
        torch.testing.assert_close(got, expected)
        return
    else:
        want = -p.gather(1, y.view(-1, 1)).log().mean()
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(got, torch.autograd.grad(want, model.embedding.weight)[0])


@pytest.mark.parametrize("head", ["linear", "sigsoftmax", "mixture_of_softmax"])
def test_perplexity_is_that_of_the_formula(head: str) -> None:
    model = small(head)
    sequences = torch.randint(11, (70, 13))
    lengths = torch.arange(1, 12)
    score = Score.of(model, sequences, lengths)
    p = probabilities(model, sequences[:, :-1])
    log_p = p.gather(2, sequences[:, 1:].unsqueeze(2)).log()
    assert score.perplexity == pytest.approx(math.exp(-log_p.mean().item()))
    assert score.bits_per_byte == pytest.approx(
        -log_p.sum().item() / math.log(2) / lengths[sequences[:, 1:]].sum().item()
    )
    assert score.accuracy == pytest.approx((p.argmax(2) == sequences[:, 1:]).double().mean().item())
    assert score.tokens == 70 * 12


@pytest.mark.parametrize("head", ["linear", "sigsoftmax"])
def test_what_is_written_is_drawn_from_the_prediction(head: str) -> None:
    model = small(head)
    with torch.no_grad():
        model.norm.weight.mul_(60)  # so that predictions are far from even
    beginning = torch.tensor([[3, 1, 4]])
    many = continued(model, beginning.expand(4000, -1), 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(many[:, :3], beginning.expand(4000, -1))
    p = probabilities(model, beginning)[0, -1]
    assert (many[:, 3].bincount(minlength=11) / 4000 - p).abs().max() < 0.03
    sharp = continued(model, beginning.expand(4000, -1), 1, temperature=0.5, generator=torch.Generator().manual_seed(0))
    assert (sharp[:, 3].bincount(minlength=11) / 4000 - p**2 / (p**2).sum()).abs().max() < 0.03
    # Beyond the context the last tokens are read.
    likely = continued(model, beginning, 20, temperature=0)
    for t in range(3, 23):
        assert likely[0, t] == probabilities(model, likely[:, max(0, t - 12) : t])[0, -1].argmax()
    with pytest.raises(ValueError, match="count must be 0 or more, got -1"):
        continued(model, beginning, -1)
    with pytest.raises(ValueError, match="temperature must be 0 or more"):
        continued(model, beginning, 1, temperature=-1.0)


def test_tied_and_untied() -> None:
    assert "head.weight" not in small().state_dict()
    untied = small(tied=False)
    assert not torch.equal(untied.head.weight, untied.embedding.weight)
    mixture = small("mixture_of_softmax")
    assert mixture.head.weight is mixture.embedding.weight
    # The transformers of a seed are alike, whatever the head.
    assert torch.equal(mixture.blocks[1].feed.into.weight, untied.blocks[1].feed.into.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers must be 1 or more, got 0"),
        ({"width": 10, "heads": 4}, "width must be a multiple of 8, for 4 heads with rotary positions, got 10"),
        ({"positions": "none"}, "positions must be one of rotary, learned, got 'none'"),
        ({"head": "cubic"}, "head must be one of linear"),
    ],
)
def test_wrong_shapes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shape(**{"vocabulary": 11} | changes)  # type: ignore[arg-type]


def test_wrong_losses_and_sequences() -> None:
    with pytest.raises(ValueError, match="unknown loss 'gm' of language models; the losses are ce, uniform"):
        LanguageLoss("gm")
    with pytest.raises(ValueError, match="tau of mixture_of_softmax must be 0"):
        LanguageLoss("mixture_of_softmax", 1.0)
    with pytest.raises(
        ValueError, match="loss mixture_of_softmax needs a model with head 'mixture_of_softmax', got 'linear'"
    ):
        small()(
            torch.zeros(1, 2, dtype=torch.int64),
            torch.zeros(1, 2, dtype=torch.int64),
            LanguageLoss("mixture_of_softmax"),
        )
    with pytest.raises(ValueError, match=r"at most 12 tokens \(context\), got 13"):
        small()(torch.zeros(1, 13, dtype=torch.int64))
