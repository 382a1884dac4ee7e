"""lab.analysis.cost against counts by hand: a multiply-add is 2; what works element by element counts inside of our ops alone."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from lab import ops
from lab.analysis.cost import cost, flops_per_token, params, state_bytes
from lab.layers import MoE
from lab.mixers import Attention, GatedMLP, H3Layer, Lattice, MambaLayer, S4DLayer, S4Layer, S5Layer, Serriform
from lab.mixers.base import Mixer, Output
from lab.models import Laminar, Stack, TransformerModel
from lab.models.decoding import DECODE
from lab.ops.backend import Backend, Op
from lab.ops.cauchy_kernel import CAUCHY_KERNEL
from lab.ops.causal_conv import CAUSAL_CONV
from lab.ops.dplr_scan import DPLR_SCAN
from lab.ops.kuramoto_scan import KURAMOTO_SCAN
from lab.ops.linear_recurrence import LINEAR_RECURRENCE
from lab.ops.selective_scan import SELECTIVE_SCAN

D, L, V = 16, 8, 11


def stack(mixer, d_ff=0, n_layers=1, **more):
    more = {"position": "none", "vocab_size": V} | more
    return Stack(d_model=D, n_layers=n_layers, mixer=mixer, d_ff=d_ff, **more)


def attention(**more):
    return Attention(n_heads=2, **more)


def transform(n):
    """A real Fourier transform: half of 5 n log2 n."""
    return 5 * n * math.log2(n) / 2


HEAD = 2 * D * V
PROJECTIONS = 4 * 2 * D * D  # q, k, v, o
SCORES = 2 * 2 * L * D  # q . k and their weights times v, for L tokens of all heads together


def test_attention_and_mlp():
    assert flops_per_token(stack(attention), L) == HEAD + PROJECTIONS + SCORES
    assert flops_per_token(stack(attention, d_ff=40, n_layers=3), L) == HEAD + 3 * (PROJECTIONS + SCORES + 2 * 2 * D * 40)


def test_attention_of_a_longer_sequence_costs_more():
    model = stack(attention)
    assert flops_per_token(model, 4 * L) - flops_per_token(model, L) == 3 * SCORES


def test_lattice():
    H, d = 4, D // 4
    drive, scan = 2 * D * H, H * (4 * H + 10)  # two products with W (H, H) at each step
    scores = 2 * L * H * (d + 2) * 2  # two columns more in q and k, and v as wide as they are
    assert flops_per_token(stack(lambda d_model: Lattice(d_model, H)), L) == HEAD + PROJECTIONS + drive + scan + scores


def test_mamba():
    E, N, K, R = 2 * D, 16, 4, 1
    layer = 2 * D * 2 * E + 2 * K * E + 2 * E * (R + 2 * N) + 2 * R * E + E * (7 * N + 3) + 2 * E * D
    assert flops_per_token(stack(MambaLayer), L) == HEAD + layer


def test_s4d_is_a_kernel_and_three_transforms():
    n, padded = 3, 2 * L
    kernel = 8 * D * n * L
    convolution = 3 * D * transform(padded) + 6 * D * (padded / 2 + 1) + 2 * L * D  # of u, of K and back; the products; D u
    mixing = 2 * D * 2 * D
    assert flops_per_token(stack(lambda d_model: S4DLayer(d_model, d_state=2 * n)), L) == HEAD + mixing + (kernel + convolution) / L


def test_s4_adds_its_cauchy_sums_and_their_transform():
    n, R, points = 3, 4, L // 2 + 1
    sums = D * points * (8 * R * n + 11 * n + 6 * R)
    convolution = 3 * D * transform(2 * L) + 6 * D * (L + 1) + 2 * L * D
    power = L * D * n * (16 + 8 * 1)  # C A'^L, as a recurrence of rank 1
    kernel = sums + power + D * transform(L)  # from the points on the circle back to the kernel
    got = flops_per_token(stack(lambda d_model: S4Layer(d_model, d_state=2 * n)), L)
    assert got == pytest.approx(HEAD + 2 * D * 2 * D + (kernel + convolution) / L)


def test_s5_is_a_scan_between_two_complex_products():
    P = 6
    layer = 2 * 2 * D * P + 8 * P + 2 * 2 * P * D + 2 * D * D  # B u, the scan, Re(C h), the gate
    assert flops_per_token(stack(lambda d_model: S5Layer(d_model, d_state=2 * P)), L) == HEAD + layer


def test_h3_is_a_short_convolution_and_an_s4d_between_three_projections():
    n = 3
    s4d = 8 * D * n + (3 * D * transform(2 * L) + 6 * D * (L + 1)) / L + 2 * D
    layer = 2 * D * 3 * D + 2 * 2 * n * D + s4d + 2 * D * D
    assert flops_per_token(stack(lambda d_model: H3Layer(d_model, d_state=2 * n)), L) == HEAD + layer


def test_serriform_is_the_sum_of_its_parts():
    K, M, r = 3, D // 4, D // 4
    convolution, recurrence, fusion, low_rank = 2 * K * D + 2 * D * D, 2 * M, 2 * D * 2 * D, 2 * 2 * D * r
    assert flops_per_token(stack(lambda d_model: Serriform(d_model)), L) == HEAD + convolution + recurrence + fusion + low_rank
    without = flops_per_token(stack(lambda d_model: Serriform(d_model, use_conv=False, use_lowrank_ff=False)), L)
    assert without == HEAD + recurrence + fusion


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_cost_as_many_as_are_chosen(top_k):
    width, E = 24, 4
    feed = lambda d_model: MoE(d_model, d_ff=width, n_experts=E, top_k=top_k)  # noqa: E731
    model = stack(attention, d_ff=None, feed_forward=feed)
    assert flops_per_token(model, L) == HEAD + PROJECTIONS + SCORES + 2 * D * E + top_k * 2 * 2 * D * width
    assert params(model) > E * 2 * D * width  # while all of them are there


def test_laminar_pays_a_fraction_for_its_coarse_stratum():
    H, K, F, ratio, P = 2, 4, 20, 4, 3
    model = Laminar(vocab_size=V, d_model=D, n_heads=H, n_layers=1, d_ff=F, n_strata=2, seq_len=64, n_oscillators=P)
    mixing = 2 * (D // (2 * H)) * (2 * H) ** 2  # the readout: pairs of H heads at a time
    field = 2 * K * D + 2 * D * 3 * D + 8 * (D // 2) + mixing + 2 * D * D
    gates = 2 * 2 * D * D  # up and down, for a token of the coarse stratum
    feed = 3 * 2 * D * F  # SwiGLU; of the last block's finest stratum alone
    mesh = P * (4 * P + 12) + 2 * 2 * P * D
    assert flops_per_token(model, L) == HEAD + field + feed + mesh + (field + gates) / ratio


def test_an_encoder_is_paid_for_with_its_source():
    one = dict(d_model=D, n_heads=2, d_ff=40, max_len=64)
    model = TransformerModel(vocab_size=V, n_layers=1, n_encoder_layers=1, **one)
    layer = PROJECTIONS + SCORES + 2 * 2 * D * 40
    assert flops_per_token(model, L) == HEAD + 2 * layer + PROJECTIONS + SCORES  # encoder, decoder, cross-attention


@pytest.mark.parametrize(
    ("op", "by_hand"),
    [
        (CAUSAL_CONV, 2 * 9 * 5 * 2 * 4),
        (LINEAR_RECURRENCE, 2 * 9 * 5 * 2),
        (KURAMOTO_SCAN, 2 * 9 * (4 * 5 * 5 + 10 * 5)),
        (SELECTIVE_SCAN, 2 * 9 * 5 * (7 * 3 + 3)),
        (DPLR_SCAN, 2 * 9 * 5 * 3 * (16 + 8 * 1)),
        (CAUCHY_KERNEL, 5 * 5 * (8 * 4 * 3 + 11 * 3 + 6 * 4)),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_an_op_on_its_example(op, by_hand):
    assert op.flops(*op.example()) == by_hand


def test_the_recurrence_is_what_its_definition_does():
    """Counted while the plain loop runs: every number that a product or a sum gives."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Arithmetic(TorchDispatchMode):
        done = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func._overloadpacket in (torch.ops.aten.mul, torch.ops.aten.add):
                self.done += out.numel()
            return out

    for op in (LINEAR_RECURRENCE, CAUSAL_CONV):
        arguments = op.example()
        with Arithmetic() as counter:
            op.backends[-1].run(*arguments)
        assert counter.done == op.flops(*arguments), op.name


def test_a_complex_multiply_add_is_eight():
    a, x, h = (torch.zeros(2, 9, 5, dtype=torch.complex64), torch.zeros(2, 9, 5, dtype=torch.complex64), torch.zeros(2, 5))
    assert LINEAR_RECURRENCE.flops(a, x, h) == 8 * x.numel()
    E, N = 5, 3
    scan = SELECTIVE_SCAN.example()
    assert SELECTIVE_SCAN.flops(*scan[:2], scan[2].to(torch.complex64), *scan[3:]) == 2 * 9 * E * (21 * N + 3)


def test_every_op_has_a_formula():
    missing = [op.name for op in ops.every() if op.flops is None and op.home.startswith("lab.")]
    assert missing == [DECODE.name], "an op without `flops` would cost nothing"  # decoding is no forward pass


class Fourier(Mixer):
    """A user's own: nothing of lab's ops."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model, self.mixing = d_model, nn.Parameter(torch.zeros(d_model, d_model))
        self.causal = False

    def mix(self, x, state, lengths, want):
        y = torch.fft.ifft(torch.fft.fft(x.transpose(1, 2)) * 2).real.transpose(1, 2)
        return Output(torch.einsum("bld,de->ble", y, self.mixing))

    def init_state(self, batch_size, device=None, dtype=None):
        self.check_causal()


def test_a_mixer_of_ones_own_is_seen_by_the_counter():
    model = stack(Fourier)
    transforms = D * (transform(L) + 2 * transform(L)) / L  # of real numbers, and back as complex ones
    assert flops_per_token(model, L) == HEAD + transforms + 2 * D * D
    assert state_bytes(model, L) is None


@torch.library.custom_op("lab_test_cost::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


doubled.register_fake(torch.empty_like)


class Opaque(Fourier):
    def mix(self, x, state, lengths, want):
        return Output(self.op(x))

    def op(self, x):
        return doubled(x)


def test_an_operator_without_a_formula_is_an_error_and_not_free():
    with pytest.raises(ValueError, match=r"operator lab_test_cost\.doubled has no formula .* `flops`"):
        flops_per_token(stack(Opaque), L)


def test_an_op_of_ones_own_counts_by_its_formula():
    op = Op("doubled_for_cost", (Backend("torch", doubled),), flops=lambda x: 3 * x.numel())
    try:

        class Own(Opaque):
            def op(self, x):
                return op(x)

        assert flops_per_token(stack(Own), L) == HEAD + 3 * D
    finally:
        ops.backend._ops.pop(op.name), ops.backend._used.pop(op.name)


def test_the_state_in_bytes():
    number = 8  # a position or a length, int64
    model = stack(attention, n_layers=2)
    assert state_bytes(model, L) == number + 2 * (2 * L * D * 4 + number)
    assert state_bytes(model, 4 * L) == number + 2 * (2 * 4 * L * D * 4 + number)
    E, N, K = 2 * D, 16, 4
    for length in (L, 16 * L):
        assert state_bytes(stack(MambaLayer), length) == number + 4 * E * (N + K - 1)
        assert state_bytes(stack(lambda d_model: S4DLayer(d_model, d_state=6)), length) == number + 4 * 2 * 3 * D
    assert state_bytes(stack(MambaLayer).double(), L) == number + 8 * E * (N + K - 1)


def test_what_goes_into_metrics_json():
    limited = stack(attention, position="learned", max_len=4 * L)
    assert list(cost(limited, L)["state_bytes"]) == [str(L), str(4 * L)]  # there is no state after 16 L tokens
    assert cost(stack(attention, n_classes=3), L)["state_bytes"] is None
    assert json.loads(json.dumps(cost(stack(MambaLayer), L)))["flops_per_token"] == flops_per_token(stack(MambaLayer), L)


def test_shared_weights_count_once():
    assert params(stack(attention, tied=True)) == params(stack(attention)) - V * D - V


def test_counting_leaves_no_trace():
    model = stack(lambda d_model: GatedMLP(d_model, ssm_layer=S4DLayer), n_layers=2)
    with ops.use(fft_conv="reference"):
        model(torch.zeros(1, 4, dtype=torch.long))
        used, numbers, draws = ops.used(), [p.clone() for p in model.parameters()], torch.get_rng_state()
        model.train()
        cost(model, L)
        assert ops.used() == used and ops.forced() == {"fft_conv": "reference"} and model.training
    assert all(torch.equal(p, before) and p.device.type == "cpu" for p, before in zip(model.parameters(), numbers, strict=True))
    assert torch.equal(torch.get_rng_state(), draws)


def test_a_model_that_scores_long_sequences_is_counted_in_no_time():
    assert state_bytes(stack(attention), 10**9) > 10**11  # nothing is computed, and no memory taken
