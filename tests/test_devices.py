"""Every model on a device of tensors without numbers: a tensor that a model leaves on the CPU is an error there, as it is on a GPU."""

from __future__ import annotations

import pytest
import torch
from test_models import MODELS, L, from_yaml, with_source
from torch.utils import _pytree as pytree


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_on_the_cpu(name):
    model = with_source(from_yaml(name).to("meta"))
    tokens, lengths = torch.zeros(3, L, dtype=torch.long, device="meta"), torch.ones(3, dtype=torch.long, device="meta")
    out = model(tokens, want=("losses",))
    (out.y.sum() + sum(out.losses.values())).backward()
    assert {p.grad.device.type for p in model.parameters()} == {"meta"}
    model.eval()
    model(tokens, lengths=lengths, want=("losses", "last"))
    with torch.no_grad():
        logits, state = model.prefill(tokens, lengths=lengths)
        after = model(tokens[:, :1], state, want=("state", "in_place"))  # without its look at the state's position
        for tensor in pytree.tree_leaves([logits, state, after.y, after.state, model.init_state(3)]):
            assert tensor.device.type == "meta"
