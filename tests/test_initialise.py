"""Initial weights are a function of (seed, the module's name): equal parts of two models start equal."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_models import lattice, vanilla

from lab.mixers import Lattice
from lab.models import Stack, initialise


def test_equal_names_and_shapes_start_equal_in_every_model():
    one, other = lattice(), vanilla()
    initialise(one, 3)
    initialise(other, 3)
    a, b = one.state_dict(), other.state_dict()
    assert set(b) < set(a) and all(torch.equal(a[name], b[name]) for name in b)
    initialise(wider := vanilla(d_ff=66), 3)
    differ = {name for name, t in wider.state_dict().items() if not (t.shape == b[name].shape and torch.equal(t, b[name]))}
    assert all(".mlp." in name for name in differ)
    assert not torch.equal(a["blocks.0.mixer.q.weight"], a["blocks.1.mixer.q.weight"])
    assert not torch.equal(a["blocks.0.mixer.theta0"], a["blocks.1.mixer.theta0"])


def test_initialisation_depends_on_the_seed_alone():
    model = lattice()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    initialise(model, 3)
    assert torch.equal(torch.get_rng_state(), state), "the global random stream moved"
    first = {name: t.clone() for name, t in model.state_dict().items()}
    torch.manual_seed(2)
    initialise(model, 3)
    assert all(torch.equal(t, first[name]) for name, t in model.state_dict().items())
    initialise(model, 4)
    drawn = [name for name, t in first.items() if t.unique().numel() > 1]
    assert drawn and all(not torch.equal(model.state_dict()[name], first[name]) for name in drawn)


def test_documented_distributions():
    model = Stack(500, 64, 1, partial(Lattice, n_heads=32), max_len=400)
    initialise(model, 0)
    mixer = model.mixers[0]
    for weight in (model.embedding.weight, model.position.weight, mixer.drive.weight):
        assert abs(weight.mean()) < 2e-3 and abs(weight.std() - 0.02) < 2e-3
    assert 0.9 <= mixer.omega.min() < 0.95 and 1.05 < mixer.omega.max() <= 1.1
    assert 0 <= mixer.theta0.min() < 1 and 5 < mixer.theta0.max() < 6.3
    assert (mixer.kappa == 0.1).all() and (mixer.alpha == 0.1).all()


def test_initialise_refuses_a_model_that_has_moved():
    with torch.device("meta"):
        model = vanilla()
    with pytest.raises(ValueError, match="embedding.weight is not on the CPU; initialise the model before moving it"):
        initialise(model, 0)
