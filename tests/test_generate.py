"""generate and stream: greedy, sampled, ragged, stopped, and their errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lab.analysis.conformance import randomise
from lab.mixers import Attention, Lattice
from lab.models import Stack, initialise
from lab.models.sampling import choose

V = 11


@pytest.fixture(params=[Attention, Lattice, partial(Lattice, drive=False), partial(Lattice, phase_mode="gain")], ids=str)
def model(request):
    model = Stack(V, 32, 2, partial(request.param, n_heads=4), max_len=24)
    initialise(model, 0)
    randomise(model, 0)
    return model.eval()


def prompt(B=4, P=6):
    return torch.randint(0, V, (B, P), generator=torch.Generator().manual_seed(2))


def test_greedy_is_the_argmax_of_forward(model):
    out = model.generate(prompt(), 12)
    assert out.shape == (4, 18) and torch.equal(out[:, :6], prompt())
    assert torch.equal(out[:, 6:], model(out)[:, 5:-1].argmax(-1))
    assert torch.equal(model.generate(prompt(), 0), prompt())
    assert torch.equal(model.generate(prompt(1, 1), 1)[:, 1], model(prompt(1, 1))[:, 0].argmax(-1))


def test_ragged_prompts_equal_single_rows(model):
    lengths = torch.tensor([6, 1, 3, 5])
    out = model.generate(prompt(), 9, lengths=lengths, pad_token=7)
    assert out.shape == (4, 15)
    for b, n in enumerate(lengths.tolist()):
        alone = model.generate(prompt()[b : b + 1, :n], 9)
        assert torch.equal(out[b, : n + 9], alone[0])
        assert (out[b, n + 9 :] == 7).all()
    noise = torch.where(torch.arange(6) < lengths[:, None], prompt(), 4)
    assert torch.equal(model.generate(noise, 9, lengths=lengths, pad_token=7), out), "padding of the prompt matters"


def test_stop_token(model):
    free = model.generate(prompt(), 12)
    stop = int(free[0, 8])
    out = model.generate(prompt(), 12, stop_token=stop, pad_token=-1)
    ends = []
    for row, want in zip(out[:, 6:].tolist(), free[:, 6:].tolist(), strict=True):
        end = want.index(stop) + 1 if stop in want else 12
        ends.append(end)
        assert row == (want[:end] + [-1] * 12)[: len(row)]
    assert out.shape[1] == 6 + max(ends), "generation ends when all rows have stopped"
    alone = model.generate(prompt(1), 12, stop_token=int(model.generate(prompt(1), 1)[0, -1]))
    assert alone.shape == (1, 7)


@pytest.mark.parametrize("lengths", [None, torch.tensor([6, 1, 3, 5])], ids=["equal", "ragged"])
def test_only_the_logits_that_are_needed_are_computed(model, lengths):
    computed = []
    model.head.register_forward_hook(lambda head, args, out: computed.append(out.shape))
    model.generate(prompt(), 3, lengths=lengths)
    assert computed == [(4, 1, V)] * 3


def test_steps_write_into_one_cache(model):
    addresses = set()
    model.blocks[0].register_forward_hook(lambda block, args, out: addresses.add(out.state["k"].data_ptr()))
    model.generate(prompt(), 8)
    assert len(addresses) == 2, "one of the prefill and one that all steps fill"


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"lengths": torch.tensor([6, 1, 3, 5])}, {"stop_token": 3}], ids=str)
def test_streaming_equals_generate(model, options):
    def seeded():
        return {**options, "generator": torch.Generator().manual_seed(5)}

    whole = model.generate(prompt(), 8, **seeded())
    lengths = options.get("lengths", torch.full((4,), 6))
    for tokens in (list(model.stream(prompt(), 8, **seeded())), list(model.generate(prompt(), 8, streaming=True, **seeded()))):
        assert all(token.shape == (4,) for token in tokens)
        for b, n in enumerate(lengths.tolist()):
            assert torch.stack(tokens, 1)[b].tolist() == whole[b, n : n + len(tokens)].tolist()


def test_sampling_is_reproducible_by_its_generator(model):
    def draw(seed):
        return model.generate(prompt(), 10, temperature=1.5, generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(0)
    first = draw(0)
    state = torch.get_rng_state()
    assert torch.equal(draw(0), first) and not torch.equal(draw(1), first)
    assert torch.equal(torch.get_rng_state(), state), "the global random stream was used"


def test_a_model_in_use_is_left_alone(model):
    """No gradients are recorded, the mode stays the caller's, and parameters, buffers and prompt do not change."""
    before, given = {name: t.clone() for name, t in model.state_dict().items()}, prompt()
    model.train()
    recorded = []
    model.blocks[0].register_forward_hook(lambda block, args, out: recorded.append(out.y.requires_grad))
    model.generate(given, 3)
    for _ in model.stream(given, 2):
        assert torch.is_grad_enabled(), "no_grad leaks out between two tokens"
    assert recorded == [False] * 5 and model.training
    assert torch.equal(given, prompt())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# The choice of a token

LOGITS = torch.tensor([[2.0, 1.0, 3.0, 0.0, -1.0]])


def frequencies(n=4000, **options):
    args = {"temperature": 1.0, "top_k": None, "top_p": None, "generator": torch.Generator().manual_seed(0), **options}
    return torch.bincount(choose(LOGITS.expand(n, -1), **args), minlength=5) / n


def test_temperature():
    for temperature in (0.5, 1.0, 2.0):
        want = torch.softmax(LOGITS[0] / temperature, -1)
        torch.testing.assert_close(frequencies(temperature=temperature), want, rtol=0, atol=0.03)
    assert frequencies(temperature=0)[2] == 1


@pytest.mark.parametrize("k", [1, 2, 5, 1000])
def test_top_k(k):
    p = torch.softmax(LOGITS[0], -1)
    p[p.argsort(descending=True)[k:]] = 0
    torch.testing.assert_close(frequencies(top_k=k), p / p.sum(), rtol=0, atol=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, [2]), (0.63, [2]), (0.65, [2, 0]), (0.9, [2, 0, 1]), (1.0, [2, 0, 1, 3, 4])])
def test_top_p(top_p, kept):
    """The probabilities are .636 .234 .086 .032 .012"""
    p = torch.softmax(LOGITS[0], -1)
    want = torch.zeros(5)
    want[kept] = p[kept] / p[kept].sum()
    torch.testing.assert_close(frequencies(top_p=top_p), want, rtol=0, atol=0.03)


def test_top_p_applies_to_what_top_k_left():
    got = frequencies(top_k=2, top_p=0.7)  # of the two, the first alone has .73
    assert got[2] == 1


# Errors


def test_max_len(model):
    assert model.generate(prompt(4, 6), 19).shape == (4, 25)  # the last token is never fed back
    with pytest.raises(ValueError, match="the prompt with max_new_tokens needs length 25, but the model was built with max_len=24"):
        model.generate(prompt(4, 6), 20)
    with pytest.raises(ValueError, match="needs length 25"):
        model.stream(prompt(4, 6), 20)  # at the call, not at the first token
    assert model.generate(prompt(2, 6), 20, lengths=torch.tensor([5, 2])).shape == (2, 26)
    _, state = model.prefill(torch.zeros(2, 20, dtype=torch.long))
    model.prefill(torch.zeros(2, 4, dtype=torch.long), state)
    with pytest.raises(ValueError, match="the state with the new tokens needs length 25"):
        model.prefill(torch.zeros(2, 5, dtype=torch.long), state)
    model.prefill(torch.zeros(2, 5, dtype=torch.long), state, lengths=torch.tensor([4, 2]))  # padding does not count
    state = model.map_state(torch.clone, model.prefill(torch.zeros(2, 4, dtype=torch.long), state)[1])
    with pytest.raises(ValueError, match="the state with the new tokens needs length 25"):
        model.step(torch.zeros(2, dtype=torch.long), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"prompt": torch.zeros(4, 0, dtype=torch.long)}, r"the prompt has shape \(4, 0\)"),
        ({"prompt": torch.zeros(4, dtype=torch.long)}, r"the prompt has shape \(4,\)"),
        ({"lengths": torch.tensor([1, 2])}, r"lengths has shape \(2,\); expected \(4,\)"),
        ({"lengths": torch.tensor([0, 1, 2, 3])}, r"lengths must lie in 1\.\.6"),
        ({"lengths": torch.tensor([7, 1, 2, 3])}, r"lengths must lie in 1\.\.6"),
    ],
)
def test_wrong_arguments_are_errors(model, arguments, message):
    with pytest.raises(ValueError, match=f"generate: .*{message}"):
        model.generate(**{"prompt": prompt(), "max_new_tokens": 2, **arguments})
