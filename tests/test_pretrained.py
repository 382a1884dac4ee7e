"""Public weights: transformers' own class with random weights on one side, ours on the other, in both directions; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import compose_yaml
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

import lab
from lab.analysis.conformance import randomise
from lab.config import ConfigError, build
from lab.models import initialise
from lab.models.pretrained import public_name
from lab.tasks import StandardLibrary

SIZES = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5}
OPTIONS = {
    "defaults": {},
    "others": {"expand": 3, "conv_kernel": 3, "time_step_rank": 5, "layer_norm_epsilon": 1e-3, "residual_in_fp32": False},
    "no bias of the convolution": {"use_conv_bias": False},
    "untied": {"tie_word_embeddings": False},
}
TOKENS = torch.randint(0, 40, (2, 19), generator=torch.Generator().manual_seed(0))


def theirs(seed=0, **options) -> MambaForCausalLM:
    """Random weights: the convolution's bias and the norms' weights too, which start at 0 and 1."""
    torch.manual_seed(seed)
    model = MambaForCausalLM(MambaConfig(**SIZES, **({"eos_token_id": None} | options))).eval()
    randomise(model, seed, scale=0.1)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A whole folder as transformers writes it; tests that break one copy it."""
    path = tmp_path_factory.mktemp("public") / "tiny"
    theirs().save_pretrained(path)
    return path


def changed(folder: Path, to: Path, **config) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    (to / "config.json").write_text(json.dumps(json.loads((to / "config.json").read_text()) | config))
    return to


@torch.no_grad()
def agree(ours, public) -> None:
    torch.testing.assert_close(ours(TOKENS), public(TOKENS).logits, rtol=0, atol=1e-5)
    new = public.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(TOKENS, 12), new)


@pytest.mark.parametrize("name", OPTIONS)
def test_their_weights_in_our_model(name, tmp_path):
    public = theirs(**OPTIONS[name])
    public.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    ours = lab.load_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before) and not ours.training
    agree(ours, public)


@pytest.mark.parametrize("name", OPTIONS)
def test_our_weights_in_their_model(name, tmp_path):
    theirs(**OPTIONS[name]).save_pretrained(tmp_path / "first")
    ours = lab.load_pretrained(tmp_path / "first")
    randomise(ours, 1, scale=0.1)
    if ours.head.bias is not None:
        torch.nn.init.zeros_(ours.head.bias)
    lab.save_pretrained(ours, tmp_path / "second")
    public, info = MambaForCausalLM.from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not any(info.values()), info
    agree(ours, public.eval())
    again = lab.load_pretrained(tmp_path / "second")
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), again.parameters(), strict=True))


def test_a_model_of_the_house_and_what_an_optimiser_reads_of_it(tmp_path):
    ours = lab.create_model("mamba", d_model=16, d_state=4, num_layers=2, vocab_size=40, dropout=0.3).eval()
    initialise(ours, 3)
    lab.save_pretrained(ours, tmp_path)
    agree(ours, MambaForCausalLM.from_pretrained(tmp_path).eval())
    again = lab.load_pretrained(tmp_path)
    decay = [getattr(p, "_optim", None) for p in ours.parameters()]
    assert any(decay) and [getattr(p, "_optim", None) for p in again.parameters()] == decay


def test_shards_and_the_first_name_of_the_embedding(folder, tmp_path):
    public = theirs()
    public.save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    agree(lab.load_pretrained(tmp_path), public)
    for shard in shards:
        tensors = {name.replace("embeddings.", "embedding."): t for name, t in load_file(shard).items()}
        save_file(tensors, shard)
    agree(lab.load_pretrained(tmp_path), public)
    shards[1].unlink()
    with pytest.raises(ConfigError, match=f"index.json names the file {shards[1].name}, which is not in the folder"):
        lab.load_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_precisions(dtype, tmp_path):
    public = theirs().to(dtype)
    public.save_pretrained(tmp_path)
    ours = lab.load_pretrained(tmp_path)
    wanted = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in ours.parameters()} == {wanted}
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), public.to(wanted)(TOKENS).logits.to(wanted), rtol=0, atol=1e-5)


def test_a_config_that_counts_tokens_where_the_weights_have_padded_rows(folder, tmp_path):
    counted = changed(folder, tmp_path / "counted", vocab_size=37, pad_vocab_size_multiple=8)
    agree(lab.load_pretrained(counted), theirs())


def test_a_config_without_what_transformers_takes_for_granted(folder, tmp_path):
    short = changed(folder, tmp_path / "short")
    keep = ("model_type", *SIZES)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({key: config[key] for key in keep}))
    agree(lab.load_pretrained(short), theirs())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"model_type": "falcon_mamba"},
            "config.json: model_type is 'falcon_mamba'; load_pretrained reads Mamba models",
        ),
        ({"use_bias": True}, "config.json: use_bias is True; .* whose use_bias is False"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act is 'gelu'; .* is 'silu'"),
        ({"hidden_size": 32}, r"backbone.embeddings.weight is \(40, 24\) in the weights, and by config.json it must be \(40, 32\)"),
        ({"num_hidden_layers": 3}, "config.json: num_hidden_layers is 3, the weights are of 2 layers"),
        ({"num_hidden_layers": 20000}, "config.json: num_hidden_layers is 20000, the weights are of 2 layers"),
        ({"hidden_size": "24"}, "config.json: Stack: d_model='24' must be an integer"),
        ({"hidden_size": 65536}, r"backbone.embeddings.weight is \(40, 24\)"),
        ({"layer_norm_epsilon": -1}, "config.json: Stack: norm_eps=-1 must be above 0"),
        ({"expand": 0}, "config.json: MambaLayer: expand_factor=0 must be at least 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_cannot_be_represented_is_one_sentence(config, sentence, folder, tmp_path):
    with pytest.raises(ConfigError, match=sentence) as error:
        lab.load_pretrained(changed(folder, tmp_path / "changed", **config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda tensors: tensors.pop("backbone.norm_f.weight"),
            r"the weights lack backbone.norm_f.weight \(24,\), which config.json speaks of",
        ),
        (lambda tensors: tensors.update(extra=torch.ones(1)), r"the weights have extra \(1,\), which a Mamba model of this config.json"),
        (
            lambda tensors: tensors.update({"backbone.embedding.weight": torch.ones(40, 24)}),
            "has backbone.embeddings.weight, which is there already",
        ),
        (
            lambda tensors: tensors.update({"backbone.norm_f.weight": torch.ones(24, dtype=torch.int8)}),
            "backbone.norm_f.weight holds I8; load_pretrained reads F32, F16, BF16, F64, no quantised weights",
        ),
    ],
    ids=["lacks one", "has one more", "has one twice", "quantised"],
)
def test_weights_that_do_not_fit(change, sentence, folder, tmp_path):
    broken = changed(folder, tmp_path / "changed")
    tensors = load_file(broken / "model.safetensors")
    change(tensors)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=sentence):
        lab.load_pretrained(broken)


def test_folders_that_lack_something(folder, tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder; `hf download OWNER/NAME --local-dir"):
        lab.load_pretrained(tmp_path / "state-spaces")
    with pytest.raises(ConfigError, match="has no config.json"):
        lab.load_pretrained(tmp_path)
    for i, (text, sentence) in enumerate([("{", "is not valid JSON"), ("[]", "must hold keys"), ("{}", "lacks model_type")]):
        broken = changed(folder, tmp_path / f"config{i}")
        (broken / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=f"config.json {sentence}"):
            lab.load_pretrained(broken)
    cut = changed(folder, tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="model.safetensors is not a whole safetensors file"):
        lab.load_pretrained(cut)
    (cut / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has neither model.safetensors nor model.safetensors.index.json"):
        lab.load_pretrained(cut)
    (cut / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(ConfigError, match="names the file ../model.safetensors, which is not in the folder"):
        lab.load_pretrained(cut)


class Payload:
    """What a pickle of weights may do when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_a_pickle_is_refused_unread(folder, tmp_path):
    pickled = changed(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({"backbone.norm_f.weight": Payload(tmp_path / "executed")}, pickled / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="has its weights in pytorch_model.bin alone: a pickle, which may execute code"):
        lab.load_pretrained(pickled)
    assert not (tmp_path / "executed").exists()


def test_a_head_that_is_said_to_be_tied_and_is_not(folder, tmp_path):
    untied = changed(folder, tmp_path / "untied")
    tensors = load_file(untied / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["backbone.embeddings.weight"].clone()}, untied / "model.safetensors")
    lab.load_pretrained(untied)
    save_file(tensors | {"lm_head.weight": tensors["backbone.embeddings.weight"] + 1}, untied / "model.safetensors")
    with pytest.raises(ConfigError, match="tie_word_embeddings is true, and yet lm_head.weight is not backbone.embeddings.weight"):
        lab.load_pretrained(untied)


MAMBA = {"num_layers": 2, "d_model": 16}


def with_a_bias():
    model = lab.create_model("mamba", **MAMBA, vocab_size=9)
    model.blocks[1].mixer.in_proj.bias = torch.nn.Parameter(torch.ones(64))
    return model


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: torch.nn.Linear(2, 2), "must be a Stack of MambaLayers alone, got Linear"),
        (lambda: lab.create_model("s4d", **MAMBA, vocab_size=9), "got Stack of S4DLayer"),
        (lambda: lab.create_model("mamba", **MAMBA), "the model has no vocabulary"),
        (with_a_bias, "its layers have another in_proj.bias than Mamba's"),
        (lambda: lab.create_model("mamba", **MAMBA, vocab_size=9, architecture_kwargs={"d_ff": 8}), r"the model has MLPs \(d_ff\)"),
        (lambda: lab.create_model("mamba", **MAMBA, vocab_size=9, architecture_kwargs={"norm": "layer"}), "its norm must be rms"),
        (lambda: lab.create_model("mamba", **MAMBA, vocab_size=9, architecture_kwargs={"tied": False}), r"its head has a bias"),
        (lambda: lab.create_model("mamba", **MAMBA, vocab_size=9, architecture_kwargs={"position": "learned"}), "learned positions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_public_format_cannot_hold(model, sentence, tmp_path):
    with pytest.raises(ValueError, match=f"save_pretrained: .*{sentence}"):
        lab.save_pretrained(model(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_failed_save_leaves_the_old_files(folder, tmp_path, monkeypatch):
    kept = changed(folder, tmp_path / "kept")
    before = {file.name: file.read_bytes() for file in kept.iterdir()}

    def full(tensors, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save", full)
    with pytest.raises(OSError, match="No space left"):
        lab.save_pretrained(lab.create_model("mamba", **MAMBA, vocab_size=9), kept)
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == before


@pytest.mark.parametrize(("name", "d_model", "n_layers"), [("mamba_130m", 768, 24), ("mamba_370m", 1024, 48)])
def test_the_published_sizes_are_theirs(name, d_model, n_layers):
    """On no device: names and shapes alone."""
    with torch.device("meta"):
        public = MambaForCausalLM(MambaConfig(hidden_size=d_model, num_hidden_layers=n_layers))
        ours = build(compose_yaml(name, "+task={vocab_size: 50280, seq_len: 32}").model)
    wanted = {name: tuple(p.shape) for name, p in public.named_parameters()}
    assert {public_name(name): tuple(p.shape) for name, p in ours.named_parameters()} == wanted


def test_a_model_of_bytes_brings_its_tokenizer(tmp_path):
    model, text = lab.create_model("mamba", **MAMBA, vocab_size=256), "\tf('größer €\U0001f389')  # \x00\n"
    lab.save_pretrained(model, tmp_path, StandardLibrary().encoding)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(text).input_ids == list(text.encode()) and tokenizer.decode(list(text.encode())) == text
    with pytest.raises(ValueError, match="bytes are 256 tokens, and the model has 9"):
        lab.save_pretrained(lab.create_model("mamba", **MAMBA, vocab_size=9), tmp_path / "nine", StandardLibrary().encoding)
    with pytest.raises(ValueError, match="encoding='bytes' is not known; expected 'bytes of UTF-8' or None"):
        lab.save_pretrained(model, tmp_path / "other", "bytes")
