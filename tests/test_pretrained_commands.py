"""lab-generate and lab-eval on a folder of public weights."""

from __future__ import annotations

import json

import pytest
import torch
from test_cli_generate import LIBRARY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import lab
from lab.cli import eval as evaluation
from lab.cli import generate
from lab.models import initialise
from lab.training.evaluate import score

WORDS = ["▁", "▁a", "▁b", "c", "<end>"]  # a tokenizer that writes the space before a word into the word, and not before a first one


def make(folder, vocab_size, encoding=None):
    model = lab.create_model("mamba", d_model=16, d_state=4, num_layers=2, vocab_size=vocab_size).eval()
    initialise(model, 0)
    lab.save_pretrained(model, folder, encoding)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights: `bytes` with a tokenizer, `ids` without one, `words`; and `source` to score the bytes on."""
    folder = tmp_path_factory.mktemp("weights")
    make(folder / "bytes", 256, "bytes of UTF-8")
    make(folder / "ids", 12)
    make(folder / "words", 8)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="▁"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(split=True), decoders.Metaspace()
    words.add_special_tokens(["<end>"])
    words.save(str(folder / "words" / "tokenizer.json"))
    (folder / "source").mkdir()
    for i in range(40):
        (folder / "source" / f"module_{i}.py").write_text(LIBRARY)
    return folder


@pytest.fixture
def say(folder, monkeypatch, capsys):
    """say("generate", *words) runs the command and gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)

    def call(command, *words):
        code = {"generate": generate, "eval": evaluation}[command].main(list(words))
        return code, *capsys.readouterr()

    return call


def test_text_goes_in_and_out_by_the_tokenizer(say, folder):
    code, out, err = say("generate", "bytes", "--prompt", "größer", "--max-new-tokens", "12", "--temperature", "1", "--seed", "3")
    prompt, generator = torch.tensor([list("größer".encode())]), torch.Generator().manual_seed(3)
    new = lab.load_pretrained("bytes").generate(prompt, 12, temperature=1.0, generator=generator)[0, prompt.shape[1] :]
    assert (code, err) == (0, "") and out == bytes(new.tolist()).decode("utf-8", "replace") + "\n"


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_words_keep_their_spaces_as_they_come(say, seed):
    code, out, _ = say("generate", "words", "--prompt", "a c", "--max-new-tokens", "20", "--temperature", "1", "--seed", seed)
    tokens = Tokenizer.from_file("words/tokenizer.json").encode("a c").ids
    new = lab.load_pretrained("words").generate(
        torch.tensor([tokens]), 20, temperature=1.0, generator=torch.Generator().manual_seed(int(seed))
    )
    decode = Tokenizer.from_file("words/tokenizer.json").decode
    assert code == 0 and out == decode(new[0].tolist())[len(decode(tokens)) :] + "\n"


def test_without_a_tokenizer_tokens_are_ids_and_it_says_so(say):
    code, out, err = say("generate", "ids", "--prompt", "3 4", "--max-new-tokens", "5")
    want = lab.load_pretrained("ids").generate(torch.tensor([[3, 4]]), 5)[0, 2:].tolist()
    assert code == 0 and [int(word) for word in out.split()] == want
    assert err == "lab-generate: prompt and answer are token ids: ids has no tokenizer.json\n"
    code, _, err = say("generate", "ids", "--prompt", "word")
    assert code == 2 and err.endswith("lab-generate: the prompt 'word' must be token ids, such as '5 6 7 2': ids has no text\n")
    code, _, err = say("generate", "ids", "--prompt", "12")
    assert code == 2 and err.endswith("lab-generate: the prompt has the token 12; those of ids are 0 to 11\n")


def test_without_the_package_that_reads_it(say, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    assert say("generate", "bytes", "--prompt", "7", "--max-new-tokens", "1")[2] == (
        "lab-generate: prompt and answer are token ids: bytes/tokenizer.json can be read after `pip install tokenizers`\n"
    )


@pytest.mark.parametrize(("file", "stop"), [("config.json", 5), ("generation_config.json", [5, 6])])
def test_a_text_ends_where_the_folder_says(say, folder, file, stop, monkeypatch):
    whole = say("generate", "ids", "--prompt", "3", "--max-new-tokens", "30", "--temperature", "1")[1].split()
    assert "5" in whole[1:-1]
    path = folder / "ids" / file
    before = path.read_text() if path.exists() else None
    path.write_text(json.dumps(json.loads(before or "{}") | {"eos_token_id": stop}))
    try:
        got = say("generate", "ids", "--prompt", "3", "--max-new-tokens", "30", "--temperature", "1")[1].split()
    finally:
        path.unlink() if before is None else path.write_text(before)
    assert got == whole[: whole.index("5") + 1]


def test_a_broken_tokenizer_and_a_choice_that_is_none(say, folder, tmp_path):
    (folder / "ids" / "tokenizer.json").write_text("{")
    try:
        code, _, err = say("generate", "ids", "--prompt", "3")
    finally:
        (folder / "ids" / "tokenizer.json").unlink()
    assert code == 2 and err.startswith("lab-generate: ids/tokenizer.json is not a tokenizer that the package tokenizers reads: ")
    assert err.count("\n") == 1
    code, _, err = say("generate", "ids", "checkpoint=last", "--prompt", "3")
    assert code == 2 and err == "lab-generate: checkpoint=last: ids holds public weights, of which nothing can be chosen\n"


SOURCE = ("task=stdlib", "task.source=source", "task.seq_len=16", "trainer.accelerator=cpu")


def test_scores_on_a_task_of_the_same_vocabulary(say, folder):
    code, out, _ = say("eval", "bytes", *SOURCE, "task.eval_lengths=[1,2]", "split=val", "--json")
    result = json.loads(out.split("\nwritten to")[0])
    assert code == 0 and json.loads((folder / "bytes" / "eval" / "stdlib-val.json").read_text()) == result
    task = lab.tasks.StandardLibrary(seq_len=16, source="source")
    want, _ = score(lab.load_pretrained("bytes"), task, "val", 2, 4, 0)
    assert result["by_length"]["32"]["bits_per_byte"] == pytest.approx(want["bits_per_byte"], rel=1e-5)
    assert (result["model"], result["task"], result["step"], result["split"]) == ("bytes", "stdlib", None, "val")
    code, out, _ = say("eval", "bytes", *SOURCE)
    assert code == 0 and "bytes on stdlib, test split, public weights" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["bytes"], "bytes is a folder of public weights, which has no task of its own: add task=NAME or experiment=NAME"),
        (["ids", *SOURCE], "task=stdlib has 256 tokens and the model of ids 12: what a token stands for must be the same"),
        (["bytes", *SOURCE, "model.d_model=8"], "model.d_model=8: the model and its weights are those of bytes; task=, experiment="),
        (["bytes", *SOURCE, "checkpoint=last"], "checkpoint=last: the model and its weights are those of bytes"),
        (["bytes", *SOURCE, "split=tset"], "split must be one of train, val, test, got 'tset'"),
        (["bytes", "task=stdlbi"], "task=stdlbi (command line): there is no such option; did you mean stdlib?"),
        (["bytes", *SOURCE, "task.seq_le=3"], "task.seq_le (command line): "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_one_sentence(say, words, sentence):
    code, out, err = say("eval", *words)
    assert code == 2 and not out and err.startswith(f"lab-eval: {sentence}") and err.count("\n") == 1


def test_a_run_becomes_a_public_folder(tiny, tmp_path):
    run = tiny("model=mamba", "model.mixer.d_state=4", *("~model.mixer.n_heads", "~model.mixer.dropout"), "trainer.max_steps=2", "~logger")
    model, task, _ = lab.load(run.path)
    lab.save_pretrained(model, tmp_path / "public", task.encoding)
    tokens = torch.arange(8)[None]
    assert torch.equal(lab.load_pretrained(tmp_path / "public")(tokens), model(tokens))
