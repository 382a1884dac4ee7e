"""Beam search: against greedy decoding and against all continuations of a tiny vocabulary."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from lab.analysis.conformance import randomise
from lab.mixers import Attention, Lattice, MambaLayer
from lab.models import LaminarNet, LaminarNetConfig, Stack, TransformerModel, beam_search, initialise

V, STOP, N = 4, 3, 4
PROMPT = torch.tensor([[1, 2, 0], [2, 2, 1]])
LENGTHS = torch.tensor([3, 2])
MODELS = {
    "attention": lambda: Stack(V, 16, 2, partial(Attention, n_heads=2), max_len=8),
    "alibi": lambda: Stack(V, 16, 1, partial(Attention, n_heads=2), max_len=8, position="alibi"),
    "lattice": lambda: Stack(V, 16, 1, partial(Lattice, n_heads=2), max_len=8),
    "mamba": lambda: Stack(V, 16, 1, MambaLayer, d_ff=0, position="none"),
    "laminar": lambda: LaminarNet(LaminarNetConfig(vocab_size=V, d_model=16, n_heads=2, n_layers=1, strata_ratios=(1, 2))),
    "seq2seq": lambda: TransformerModel(V, 16, 2, 1, max_len=8),
}


def made(name: str):
    model = MODELS[name]()
    initialise(model, 0)
    randomise(model, 0)
    given = {"source": torch.tensor([[1, 0, 2], [2, 3, 0]]), "source_lengths": LENGTHS} if model.takes_source else {}
    return model.eval(), given


def scored(model, given, row: int, every: list[list[int]], penalty: float) -> list[float]:
    prompt, n = PROMPT[row : row + 1, : LENGTHS[row]].expand(len(every), -1), torch.tensor([len(new) for new in every])
    source = {name: tensor[row : row + 1].expand(len(every), *tensor.shape[1:]) for name, tensor in given.items()}
    new = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in every], batch_first=True)
    logits = model(torch.cat([prompt, new], 1), **source)[:, prompt.shape[1] - 1 : -1].double()
    log_p = logits.log_softmax(-1).gather(2, new[..., None])[..., 0]
    return ((log_p * (torch.arange(new.shape[1]) < n[:, None])).sum(1) / n**penalty).tolist()


@torch.no_grad()
@pytest.mark.parametrize(("name", "penalty"), [*((name, 0.0) for name in MODELS), ("attention", 1.0), ("seq2seq", 0.7)])
def test_a_wide_beam_is_an_exhaustive_search(name, penalty):
    model, given = made(name)
    every = []
    for n in range(1, N + 1):
        for new in itertools.product(range(V), repeat=n):
            if STOP not in new[:-1] and (new[-1] == STOP or n == N):
                every.append(list(new))
    found = beam_search(model, PROMPT, N, V**N, length_penalty=penalty, stop_token=STOP, pad_token=-1, lengths=LENGTHS, **given)
    for row in range(2):
        scores = dict(zip(map(tuple, every), scored(model, given, row, every, penalty), strict=True))
        want = sorted(scores.values(), reverse=True)
        torch.testing.assert_close(found.scores[row, : len(every)], torch.tensor(want), rtol=1e-4, atol=1e-5)
        assert found.scores[row, len(every) :].isneginf().all()
        for tokens, score in zip(found.tokens[row, :20].tolist(), found.scores[row].tolist(), strict=False):
            assert scores[tuple(token for token in tokens if token >= 0)] == pytest.approx(score, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_one_beam_is_greedy(name):
    model, given = made(name)
    for end in ({}, {"stop_token": STOP, "pad_token": 7}):
        one = beam_search(model, PROMPT, 5, 1, lengths=LENGTHS, **end, **given)
        greedy = torch.stack(list(model.stream(PROMPT, 5, lengths=LENGTHS, **end, **given)), 1)
        assert torch.equal(one.tokens[:, 0], greedy)


@torch.no_grad()
def test_generate_takes_the_best_of_more_beams():
    model, _ = made("attention")
    beams = beam_search(model, PROMPT, 5, 3, lengths=LENGTHS)
    assert beams.tokens.shape == (2, 3, 5) and (beams.scores.diff(dim=1) <= 0).all()
    out = model.generate(PROMPT, 5, beams=3, lengths=LENGTHS, pad_token=0)
    assert torch.equal(out[0, 3:], beams.tokens[0, 0]) and torch.equal(out[1, 2:7], beams.tokens[1, 0])
    alone = beam_search(model, PROMPT[1:, :2], 5, 3)
    torch.testing.assert_close(alone.scores, beams.scores[1:], rtol=1e-4, atol=1e-5)
    for b in range(2):
        greedy = model.generate(PROMPT, 5, lengths=LENGTHS)[b, LENGTHS[b] :][:5].tolist()
        assert float(beams.scores[b, 0]) >= scored(model, {}, b, [greedy], 0.0)[0] - 1e-5


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: beam_search(m, PROMPT, 2, 0), "beams=0 must be at least 1"),
        (lambda m: beam_search(m, PROMPT, 0, 2), "max_new_tokens=0 must be at least 1"),
        (lambda m: beam_search(m, PROMPT, 9, 2), "needs length 11, but the model was built with max_len=8"),
        (lambda m: m.generate(PROMPT, 2, beams=2, temperature=1.0), "temperature 0, no streaming"),
        (lambda m: m.generate(PROMPT, 2, beams=2, streaming=True), "temperature 0, no streaming"),
    ],
)
def test_wrong_calls_are_errors(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(made("attention")[0])
