"""What every sequence model must satisfy, as plain functions that raise an AssertionError with a clear sentence.

    model = ...; randomise(model, seed=0)      # properties must hold for any parameters, not only those of the initialisation
    for check in CHECKS:
        check(model, tokens)                   # tokens (B, L), long, no row equal to another
    check_checkpoint(model, make, tokens)      # make() builds the same architecture afresh
    check_borders(model, tokens)               # at least LONG tokens: the lengths at which the kernels begin another chunk

    for check in CHECKS:                       # an encoder-decoder, with one source for all rows
        check(WithSource(model, source), tokens)
    check_source(model, tokens, source)        # and with one for each row

Checks run in eval mode (gradients: in the mode of the model) and restore the mode. B = batch, L = length, V = vocabulary.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lab.mixers import Lattice, Mixer, Output, State
from lab.models import SequenceModel, evaluating

RTOL, ATOL = 1e-4, 1e-5  # float32; the same sums in another order
TIME_STEPS = (-6.0, 3.0)  # biases of time steps: from 1/400 to 20 (as an exponential) or 3 (as a softplus)
BORDERS = tuple(n for border in (3, 16, 32, 48, 64, 67, 128, 131, 256, 512) for n in (border - 1, border, border + 1))
"""The scans keep or restart their states every 16 steps, in PyTorch every 64. The kernel of S4D restarts every 32 vectors: every 128, 256
or 512 steps, by the width of the machine's; its prefill goes by 256. A causal convolution computes its first K - 1 outputs alone, then
blocks of 64: of K = 4 at 3, 67, 131."""
LONG = BORDERS[-1] + 3


def randomise(model: torch.nn.Module, seed: int, scale: float = 0.2) -> None:
    """Adds scale * N(0, 1) to every parameter, reproducibly; biases of time steps are drawn from U(TIME_STEPS)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter.device, parameter.dtype))
        for module in model.modules():
            if isinstance(module, Mixer) and (bias := module.time_step_bias) is not None:
                low, high = TIME_STEPS
                uniform = torch.rand(bias.shape, generator=generator, dtype=torch.float64)
                bias.copy_(low + (high - low) * uniform)


def same(got: Tensor, want: Tensor, what: str, size: float = 1.0) -> None:
    """size: of what was summed up, where that is longer than usual: what float32 rounds off grows with it."""
    torch.testing.assert_close(got, want, rtol=RTOL, atol=ATOL * size, msg=lambda text: f"{what}: {text}")


def identical(got: Tensor, want: Tensor, what: str) -> None:
    assert torch.equal(got, want), f"{what}: largest difference {(got - want).abs().max().item():.3g}, expected none"


def another(tokens: Tensor, logits: Tensor) -> Tensor:
    """Tokens of the same vocabulary that differ everywhere."""
    return (tokens + 1) % logits.shape[-1]


def check_causality(model: SequenceModel, tokens: Tensor) -> None:
    """Tokens from t on change nothing before t, and something from t on."""
    with evaluating(model):
        want = model(tokens)
        other = another(tokens, want)
        for t in range(tokens.shape[1]):
            got = model(torch.cat([tokens[:, :t], other[:, t:]], 1))
            same(got[:, :t], want[:, :t], f"logits before {t} depend on tokens from {t} on")
            assert not torch.allclose(got[:, t], want[:, t], RTOL, ATOL), f"logits at {t} do not depend on token {t}"


def check_continuation(model: SequenceModel, tokens: Tensor) -> None:
    """prefill of k tokens + steps, and prefill + prefill, give the logits of forward. For every k; k = 0 starts from init_state."""
    B, L = tokens.shape
    with evaluating(model):
        want = model(tokens)
        for k in range(L + 1):
            state = model.init_state(B)
            if k:
                logits, state = model.prefill(tokens[:, :k])
                same(logits, want[:, :k], f"prefill of {k}")
            if k < L:
                rest, _ = model.prefill(tokens[:, k:], state)
                same(rest, want[:, k:], f"second prefill after {k}")
            for t in range(k, L):
                token = tokens[:, t] if t % 2 else tokens[:, t : t + 1]  # (B,) and (B, 1) are both accepted
                logits, state = model.step(token, state)
                same(logits, want[:, t], f"step {t} after a prefill of {k}")


def check_state_is_pure(model: SequenceModel, tokens: Tensor) -> None:
    """A kept state can be continued twice: step and prefill neither change it nor remember it."""
    k = tokens.shape[1] // 2
    with evaluating(model):
        _, state = model.prefill(tokens[:, :k])
        kept = model.map_state(torch.clone, state)
        want, _ = model.step(tokens[:, k], state)
        other, _ = model.step(another(tokens, want)[:, k], state)
        model.prefill(another(tokens, want)[:, k:], state)
        again, _ = model.step(tokens[:, k], state)
        identical(again, want, "a state continued a second time gives other logits")
        assert not torch.allclose(other, want, RTOL, ATOL), "a step does not depend on its token"
        for before, after in zip(pytree.tree_leaves(kept), pytree.tree_leaves(state), strict=True):
            if isinstance(before, Tensor):
                identical(after, before, "step changed a tensor of the state it was given")


def check_gradients(model: SequenceModel, tokens: Tensor, without: tuple[str, ...] = ()) -> None:
    """Cross-entropy and the losses together reach every parameter.

    Those whose last name is in `without` get |grad| < 1e-6. Every declared loss is returned, is finite and reaches a parameter on its own.
    """
    parameters = dict(model.named_parameters())
    out = model(tokens[:, :-1], want=("losses",))
    assert set(out.losses) == set(model.loss_names), f"returned losses {sorted(out.losses)}, declared {sorted(model.loss_names)}"
    for name, loss in out.losses.items():
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
        assert any(g is not None and g.abs().max() > 0 for g in grads), f"loss {name} has no gradient"
    cross_entropy = F.cross_entropy(out.y.flatten(0, 1), tokens[:, 1:].flatten())
    total = cross_entropy + sum(out.losses.values())
    for (name, _), grad in zip(parameters.items(), torch.autograd.grad(total, list(parameters.values()), allow_unused=True), strict=True):
        assert grad is not None, f"{name} has no gradient"
        size = grad.abs().max().item()
        assert torch.isfinite(grad).all(), f"{name} has a gradient that is not finite"
        if name.rpartition(".")[2] in without:
            assert size < 1e-6, f"{name} should have no gradient, but has {size:.3g}"
        else:
            assert size > 1e-8, f"{name} has a gradient of {size:.3g}"


def idle(model: torch.nn.Module) -> tuple[str, ...]:
    """The last names of parameters that have no gradient by the definition of their layer, for `check_gradients`."""
    return ("alpha",) if any(isinstance(m, Lattice) and m.phase_mode == "literal" for m in model.modules()) else ()


def check_batch_independence(model: SequenceModel, tokens: Tensor) -> None:
    """A row gives the same logits alone as in a batch."""
    with evaluating(model):
        want = model(tokens)
        for b in range(tokens.shape[0]):
            same(model(tokens[b : b + 1])[0], want[b], f"row {b} alone")


def check_padding(model: SequenceModel, tokens: Tensor) -> None:
    """What stands in the padding changes neither logits at real positions, nor losses, nor the state. "last" is the last real token, with
    `lengths` and without."""
    B, L = tokens.shape
    lengths = torch.arange(B, device=tokens.device) * max(1, L // B) % L + 1  # ragged, one row of length 1
    real = torch.arange(L, device=tokens.device) < lengths[:, None]
    with evaluating(model):
        padded = model(tokens, lengths=lengths, want=("state", "losses"))
        garbage = torch.where(real, tokens, another(tokens, padded.y))
        changed = model(garbage, lengths=lengths, want=("state", "losses"))
        same(changed.y[real], padded.y[real], "padding changes the logits of real tokens")
        last = model(garbage, lengths=lengths, want=("last",)).y
        same(last, padded.y[torch.arange(B), lengths - 1][:, None], "the logits of the last real tokens")
        same(model(tokens, want=("last",)).y, model(tokens)[:, -1:], "the logits of the last tokens")
        rows = [model(tokens[b : b + 1, :n], want=("state", "losses")) for b, n in enumerate(lengths.tolist())]
        for name, loss in padded.losses.items():
            identical(changed.losses[name], loss, f"padding changes the loss {name}")
        # Both chunks ragged: the second starts at other positions in each row, and its own padding follows.
        chunk, lengths2 = tokens[:, : max(1, L // 3)], lengths.flip(0).clamp(max=max(1, L // 3))
        second = model(chunk, changed.state, lengths=lengths2, want=("state",))
        third, _ = model.step(tokens[:, 0], second.state)
        for b, (row, n, n2) in enumerate(zip(rows, lengths.tolist(), lengths2.tolist(), strict=True)):
            same(padded.y[b, :n], row.y[0], f"row {b} of length {n}, padded")
            alone = model(chunk[b : b + 1, :n2], row.state, want=("state",))
            same(second.y[b, :n2], alone.y[0], f"row {b}: a chunk after a padded one")
            same(third[b], model.step(tokens[b : b + 1, 0], alone.state)[0][0], f"row {b}: a step after two padded chunks")
        same_length = model(tokens, lengths=torch.full_like(lengths, L), want=("losses",))
        cut = model(tokens, lengths=torch.full_like(lengths, L - 1), want=("losses",))
        for name, loss in model(tokens, want=("losses",)).losses.items():
            same(same_length.losses[name], loss, f"loss {name} with lengths that pad nothing")
        for name, loss in model(tokens[:, : L - 1], want=("losses",)).losses.items():
            same(cut.losses[name], loss, f"loss {name} with padding, against the cut sequence")


def check_state_rows(model: SequenceModel, tokens: Tensor) -> None:
    """A state can be reordered and sliced by rows."""
    B, k = tokens.shape[0], tokens.shape[1] // 2
    order = torch.arange(B, device=tokens.device).flip(0)
    with evaluating(model):
        _, state = model.prefill(tokens[:, :k])
        want, _ = model.step(tokens[:, k], state)
        for rows in (order, order[:1]):
            got, _ = model.step(tokens[rows, k], model.map_state(partial(torch.index_select, dim=0, index=rows), state))
            same(got, want[rows], f"rows {rows.tolist()} of a state")


def check_no_memory(model: SequenceModel, tokens: Tensor) -> None:
    """Nothing a call does changes what a later one returns. Forward, backward and steps in between, in both modes."""
    before = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    training = model.training
    with evaluating(model):
        want = model(tokens)
        identical(model(tokens), want, "eval twice")
    model.train()
    model(another(tokens, want), want=("losses",)).y.sum().backward()
    model.zero_grad()
    model.train(training)
    with evaluating(model):
        _, state = model.prefill(tokens[:, :1])
        model.step(tokens[:, 1], state)
        identical(model(tokens), want, "eval after a training pass")
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        identical(t, before[name], f"a forward pass changed {name}")


def check_record(model: SequenceModel, tokens: Tensor) -> None:
    """Asking for more than the logits does not change them, and returns what was asked for alone."""
    with evaluating(model):
        want = model(tokens)
        for fields in (("state",), ("losses",), ("record",), ("state", "losses", "record")):
            out = model(tokens, want=fields)
            same(out.y, want, f"logits with want={fields}")
            assert (out.state is not None) == ("state" in fields), f"want={fields}: state is {type(out.state).__name__}"
            assert set(out.losses) == set(model.loss_names if "losses" in fields else ()), f"want={fields}: losses {sorted(out.losses)}"
            assert "record" in fields or not out.record, f"want={fields}: record {sorted(out.record)}"


def check_borders(model: SequenceModel, tokens: Tensor, borders: tuple[int, ...] = BORDERS) -> None:
    """Prefill + prefill and prefill + steps give the logits of forward where the kernels begin another chunk. So do the rows of a padded
    batch that end at, before and behind such a place. tokens (3, L), L at least two more than the last border."""
    with evaluating(model):
        want = model(tokens)
        alike = partial(same, size=max(1.0, float(want.abs().max())))
        for n in borders:
            logits, state = model.prefill(tokens[:, :n])
            alike(logits, want[:, :n], f"prefill of {n}")
            rest, _ = model.prefill(tokens[:, n:], state)
            alike(rest, want[:, n:], f"second prefill after {n}")
            lengths = torch.tensor([n, n - 1, max(1, n - 2)], device=tokens.device)
            padded = model(tokens[:, :n], lengths=lengths, want=("state",))
            rows = torch.arange(len(tokens), device=tokens.device)
            for step in range(2):
                logits, state = model.step(tokens[:, n + step], state)
                alike(logits, want[:, n + step], f"step {step + 1} after a prefill of {n}")
                place = lengths + step
                logits, padded_state = model.step(tokens[rows, place], padded.state)
                alike(logits, want[rows, place], f"step {step + 1} after a padded prefill of {lengths.tolist()}")
                padded = padded._replace(state=padded_state)


def check_checkpoint(model: SequenceModel, make: Callable[[], SequenceModel], tokens: Tensor) -> None:
    """A saved state dict gives bit-equal logits in a model built afresh. It is loaded with weights_only=True."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = make()
    randomise(other, seed=1)
    with evaluating(model), evaluating(other):
        want = model(tokens)
        assert not torch.equal(other(tokens), want), "another seed gives the same model"
        other.load_state_dict(torch.load(file, weights_only=True))
        identical(other(tokens), want, "a loaded checkpoint")


class WithSource(SequenceModel):
    """An encoder-decoder whose rows all have the source (1, S): to its callers a model of tokens alone."""

    def __init__(self, model: SequenceModel, source: Tensor) -> None:
        super().__init__()
        self.model, self.loss_names = model, model.loss_names
        self.register_buffer("source", source[:1], persistent=False)

    source: Tensor

    def forward(
        self,
        tokens: Tensor,
        state: State = None,
        *,
        lengths: Tensor | None = None,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        want: tuple[str, ...] = (),
    ) -> Tensor | Output:
        given = None if state is not None else self.source.expand(len(tokens), -1)
        out: Tensor | Output = self.model(tokens, state, lengths=lengths, source=given, want=want)
        return out

    def init_state(
        self,
        batch_size: int,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        return self.model.init_state(batch_size, self.source.expand(batch_size, -1), None, device, dtype)


def check_source(model: SequenceModel, tokens: Tensor, source: Tensor) -> None:
    """Every logit depends on every real token of its own source and on nothing else. Not on padding, not on other rows. A state
    holds its source; it can be reordered and continued. A source without a real token gives finite logits."""
    (B, L), S = tokens.shape, source.shape[1]
    lengths = torch.arange(B, device=source.device) * max(1, S // B) % S + 1
    real = torch.arange(S, device=source.device) < lengths[:, None]
    order = torch.arange(B, device=source.device).flip(0)
    with evaluating(model):
        want = model(tokens, source=source, source_lengths=lengths)
        garbage = torch.where(real, source, another(source, want))
        same(model(tokens, source=garbage, source_lengths=lengths), want, "logits with other padding of the source")
        full = model(tokens, source=source)
        same(model(tokens, source=source, source_lengths=torch.full_like(lengths, S)), full, "source_lengths that pad nothing")
        for s in range(S):
            changed = source.clone()
            changed[:, s] = another(source, want)[:, s]
            off = (model(tokens, source=changed) - full).abs().amax(-1)
            assert bool((off > 0).all()), f"some logits do not depend on token {s} of the source"
        state = model.init_state(B, garbage, lengths)
        flipped = model.map_state(partial(torch.index_select, dim=0, index=order), state)
        for b, n in enumerate(lengths.tolist()):
            same(model(tokens[b : b + 1], source=source[b : b + 1, :n])[0], want[b], f"row {b} alone with its source")
        for t in range(L):
            logits, state = model.step(tokens[:, t], state)
            same(logits, want[:, t], f"step {t} after init_state with a source")
            logits, flipped = model.step(tokens[order, t], flipped)
            same(logits, want[order, t], f"step {t} of a reordered state with a source")
        nothing = model(tokens, source=source, source_lengths=torch.zeros_like(lengths))
        assert torch.isfinite(nothing).all(), "a source without a real token gives logits that are not finite"


CHECKS: tuple[Callable[[SequenceModel, Tensor], None], ...] = (
    check_causality,
    check_continuation,
    check_state_is_pure,
    check_gradients,
    check_batch_independence,
    check_padding,
    check_state_rows,
    check_no_memory,
    check_record,
)
