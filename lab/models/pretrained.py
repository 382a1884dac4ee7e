"""Public Mamba weights: folders in the format of `transformers` (MambaForCausalLM, model_type "mamba"), read and written.

    config.json            sizes and options
    model.safetensors      the weights; or shards of them, which model.safetensors.index.json names
    tokenizer.json         what the tokens stand for, if it is there

Nothing in such a folder is executed, and transformers is not needed. The layer is `lab.mixers.MambaLayer`, arXiv:2312.00752.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lab.config.errors import ConfigError
from lab.files import atomic, write_json
from lab.mixers import MambaLayer
from lab.models.stack import Stack

BYTES = "bytes of UTF-8"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

DEFAULTS: dict[str, Any] = {
    "vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32, "state_size": 16, "expand": 2, "conv_kernel": 4,
    "time_step_rank": "auto", "time_step_min": 1e-3, "time_step_max": 1e-1, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    "use_conv_bias": True,
}  # fmt: skip
"""What transformers takes for a key that config.json leaves out."""

ONLY = {"model_type": "mamba", "hidden_act": "silu", "use_bias": False, "rms_norm": True}
"""What MambaLayer and the stack around it are; another value is an error, a missing one is this."""

PUBLIC = {"embedding": "backbone.embeddings", "norm": "backbone.norm_f", "head": "lm_head"}
"""Our name of a module outside of the blocks -> theirs."""


LAYER = {
    "A_log",
    "D",
    "conv1d.bias",
    "conv1d.weight",
    "dt_proj.bias",
    "dt_proj.weight",
    "in_proj.weight",
    "out_proj.weight",
    "x_proj.weight",
}
"""The parameters of a layer, under the same names in both."""


def load_pretrained(path: str | Path) -> Stack:
    """The model of a folder, in eval mode on the CPU, in float32 (float64 if it was stored so). ConfigError, in one sentence, for a folder
    that lacks something or holds a model that the stack of MambaLayers cannot be.

    Half precision is converted. Without a bias of the convolution or of the head in the file, ours is 0.
    """
    folder = Path(path)
    config = read_config(folder)
    with _opened(folder) as stored:
        model = _built(config, folder, stored)
        dtype = stored[public_name("embedding.weight")].dtype
        for name, empty in list(model.named_parameters()):
            tensor = stored.get(public_name(name))
            filled = torch.zeros(empty.shape, dtype=dtype) if tensor is None else tensor.read().to(dtype, copy=True)
            parameter = nn.Parameter(filled)
            parameter.__dict__.update(empty.__dict__)  # what the optimiser is told of it
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, parameter)
        if config["tie_word_embeddings"]:
            model.head.weight = model.embedding.weight
            head = stored.get("lm_head.weight")
            if head is not None and not torch.equal(head.read().to(dtype), cast(Tensor, model.embedding.weight)):
                raise ConfigError(f"{folder}: tie_word_embeddings is true, and yet lm_head.weight is not backbone.embeddings.weight")
    return model.eval()


def save_pretrained(model: nn.Module, path: str | Path, encoding: str | None = None) -> None:
    """Writes config.json and model.safetensors into a folder, which `transformers` loads and `load_pretrained` as well. Both are written
    whole before they take the place of old ones. ValueError for a model that is not a stack of equal MambaLayers.

    encoding: what a token is. A task says it, `task.encoding`; for "bytes of UTF-8" a tokenizer.json of bytes is written too.
    """
    from safetensors.torch import save

    config, folder = config_of(model), Path(path)
    if encoding not in (None, BYTES):
        raise ValueError(f"save_pretrained: encoding={encoding!r} is not known; expected {BYTES!r} or None")
    if encoding == BYTES and config["vocab_size"] != 256:
        raise ValueError(f"save_pretrained: bytes are 256 tokens, and the model has {config['vocab_size']}")
    tensors = {public_name(name): t.detach().cpu().contiguous() for name, t in model.named_parameters() if name != "head.bias"}
    with atomic(folder / CONFIG) as described, atomic(folder / WEIGHTS) as weights:
        weights.write(save(tensors, metadata={"format": "pt"}))
        described.write(json.dumps(config, indent=2).encode() + b"\n")
    if encoding is not None:
        write_json(folder / "tokenizer.json", byte_tokenizer())
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False})


def byte_tokenizer() -> dict[str, Any]:
    """tokenizer.json whose tokens are the bytes of UTF-8. The package writes a byte that is no printable Latin-1 character as one from
    U+0100 on, in their order (the table of GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {characters[byte]: byte for byte in range(256)}, "merges": []},
    }


def vocabulary(model: Stack) -> int:
    """The vocabulary of a model, padding included."""
    return cast(nn.Embedding, model.embedding).num_embeddings


def public_name(name: str) -> str:
    """The name that transformers has for a parameter of the stack."""
    first, _, rest = name.partition(".")
    if first == "blocks":
        return "backbone.layers." + rest.replace(".norm1.", ".norm.")
    return f"{PUBLIC[first]}.{rest}"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json with the defaults. ConfigError where it is missing or of another model."""
    file = folder / CONFIG
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder; `hf download OWNER/NAME --local-dir {folder}` makes one of a public model")
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no {CONFIG}: it is not a folder of public weights") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} must hold keys and values, not a {type(config).__name__}")
    if "model_type" not in config:
        raise ConfigError(f"{file} lacks model_type, which is {ONLY['model_type']} where load_pretrained can read the model")
    for key, only in ONLY.items():
        if config.get(key, only) != only:
            raise ConfigError(f"{file}: {key} is {config[key]!r}; load_pretrained reads Mamba models whose {key} is {only!r}")
    return DEFAULTS | config


def _built(config: Mapping[str, Any], folder: Path, stored: Mapping[str, Stored]) -> Stack:
    """A model of these sizes whose parameters hold no numbers yet: drawing them would take longer than reading the file. Its names and
    shapes are those in the file."""
    vocab_size, rank = config["vocab_size"], config["time_step_rank"]
    embedding = stored.get(public_name("embedding.weight"))
    multiple = config.get("pad_vocab_size_multiple", 1)
    if embedding is not None and isinstance(vocab_size, int) and isinstance(multiple, int) and multiple > 0:
        padded = -(-vocab_size // multiple) * multiple
        vocab_size = padded if embedding.shape[0] == padded else vocab_size  # some configs count the tokens, some the rows

    layers = len({name.split(".")[2] for name in stored if name.startswith("backbone.layers.")})
    if config["num_hidden_layers"] != layers:  # before so many are built
        raise ConfigError(f"{folder / CONFIG}: num_hidden_layers is {config['num_hidden_layers']!r}, the weights are of {layers} layers")
    try:
        mixer = partial(
            MambaLayer, d_state=config["state_size"], expand_factor=config["expand"], d_conv=config["conv_kernel"],
            dt_rank=None if rank == "auto" else rank, dt_min=config["time_step_min"], dt_max=config["time_step_max"],
            n_layers=config["num_hidden_layers"],
        )  # fmt: skip
        with torch.device("meta"):
            model = Stack(
                vocab_size, config["hidden_size"], config["num_hidden_layers"], mixer, d_ff=0, position="none", norm="rms",
                norm_eps=config["layer_norm_epsilon"], tied=config["tie_word_embeddings"],
            )  # fmt: skip
    except (ValueError, TypeError, RuntimeError) as error:  # of torch: a size beyond all memory
        raise ConfigError(f"{folder / CONFIG}: {error}") from error
    wanted = {public_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    zero = {"lm_head.bias"} | (set() if config["use_conv_bias"] else {name for name in wanted if name.endswith("conv1d.bias")})
    for name, shape in wanted.items():
        if name not in stored and name not in zero:
            raise ConfigError(f"{folder}: the weights lack {name} {shape}, which {CONFIG} speaks of")
        if name in stored and stored[name].shape != shape:
            raise ConfigError(f"{folder}: {name} is {stored[name].shape} in the weights, and by {CONFIG} it must be {shape}")
    for name in stored:
        if name not in wanted and name != "lm_head.weight":
            raise ConfigError(f"{folder}: the weights have {name} {stored[name].shape}, which a Mamba model of this {CONFIG} does not have")
    return model


def config_of(model: nn.Module) -> dict[str, Any]:
    """config.json of a model. ValueError where transformers' class has no place for what it is."""

    def refuse(reason: str) -> ValueError:
        return ValueError(f"save_pretrained: {reason}; the public format is for create_model('mamba') and what the mamba YAMLs make")

    if not isinstance(model, Stack) or not all(type(mixer) is MambaLayer for mixer in model.mixers):
        raise refuse(f"the model must be a Stack of MambaLayers alone, got {type(model).__name__}{_kinds(model)}")
    for name in sorted(set().union(*({name for name, _ in mixer.named_parameters()} ^ LAYER for mixer in model.mixers))):
        raise refuse(f"its layers have another {name} than Mamba's")
    if not isinstance(model.embedding, nn.Embedding):
        raise refuse("the model has no vocabulary")
    if model.position is not None or any(block.mlp is not None for block in model.blocks):
        raise refuse("the model has " + ("learned positions" if model.position is not None else "MLPs (d_ff)"))
    norms = [model.norm, *(block.norm1 for block in model.blocks)]
    if not all(isinstance(norm, nn.RMSNorm) for norm in norms):
        raise refuse("its norm must be rms")
    if isinstance(model.head.bias, Tensor) and bool(model.head.bias.any()):
        raise refuse("its head has a bias (tied: false)")
    vocab_size, d_model = model.embedding.weight.shape
    sizes = {(layer.d_inner, layer.d_state, layer.d_conv, layer.dt_rank) for layer in model.mixers if isinstance(layer, MambaLayer)}
    if len(sizes) > 1:
        raise refuse("its layers have different sizes")
    ((d_inner, d_state, d_conv, dt_rank),) = sizes
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": vocab_size,
        "hidden_size": d_model,
        "intermediate_size": d_inner,
        "num_hidden_layers": len(model.blocks),
        "state_size": d_state,
        "expand": d_inner // d_model,
        "conv_kernel": d_conv,
        "time_step_rank": dt_rank,
        "layer_norm_epsilon": model.norm.eps,
        "tie_word_embeddings": model.head.weight is model.embedding.weight,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "residual_in_fp32": True,
        "bos_token_id": None,  # what ends a text is the task's to know; transformers would take token 0
        "eos_token_id": None,
        "pad_token_id": None,
        "torch_dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
    }


def _kinds(model: nn.Module) -> str:
    return f" of {', '.join(dict.fromkeys(type(mixer).__name__ for mixer in model.mixers))}" if isinstance(model, Stack) else ""


FLOATS = ("F32", "F16", "BF16", "F64")


class Stored:
    """A tensor in a file, not yet read."""

    def __init__(self, file: Any, name: str) -> None:
        part = file.get_slice(name)
        if part.get_dtype() not in FLOATS:
            raise ConfigError(f"{name} holds {part.get_dtype()}; load_pretrained reads {', '.join(FLOATS)}, no quantised weights")
        self.file, self.name, self.shape = file, name, tuple(part.get_shape())
        self.dtype = torch.float64 if part.get_dtype() == "F64" else torch.float32  # what it is computed in

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)


@contextmanager
def _opened(folder: Path) -> Iterator[dict[str, Stored]]:
    """The tensors of a folder by their public names."""
    from safetensors import SafetensorError, safe_open

    stored: dict[str, Stored] = {}
    with ExitStack() as open_files:
        for file in _files(folder):
            try:
                opened = open_files.enter_context(safe_open(file, framework="pt"))
                for name in opened.keys():  # noqa: SIM118
                    ours = name.replace("backbone.embedding.", "backbone.embeddings.")  # as the first public files have it
                    if ours in stored:
                        raise ConfigError(f"{file} has {name}, which is there already, in this file or in another")
                    stored[ours] = Stored(opened, name)
            except SafetensorError as error:
                raise ConfigError(f"{file} is not a whole safetensors file: {error}") from error
        yield stored


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickles = sorted(folder.glob("*.bin"))
        if pickles:
            raise ConfigError(
                f"{folder} has its weights in {pickles[0].name} alone: a pickle, which may execute code as it is read, is not loaded; "
                f"transformers' save_pretrained writes {WEIGHTS}"
            )
        raise ConfigError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    try:
        names = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{folder / INDEX} is not an index of shards: it must have a weight_map of names to files") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise ConfigError(f"{folder / INDEX} names the file {name}, which is not in the folder")
    return [folder / name for name in names]
