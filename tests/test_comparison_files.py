"""The words and the file of lab-compare: what they ask for, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import comparison_file
import pytest
from comparison_file import FILE, run

from lab.config import compose
from lab.sweeps import comparison_words

file = comparison_file.file  # fixture
ROOT = Path(__file__).parents[1]
COMPARISONS = sorted(path for name in ("repro", "ablation", "all_models") for path in (ROOT / "experiments" / name).glob("*.yaml"))


# ----------------------------------------------------------------------- mistakes


def mistake(words, capsys) -> str:
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and not Path("runs").exists()
    return err.removeprefix("lab-compare: ").strip()


MODELS = "models:\n  attention: [model=transformer, model.max_len=16]\n  mamba:\n"
FIRST, SECOND = "test/exact_match, model: mamba, scale", "over: attention, at_least: 0.1, "


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("models:", "modles:", "modles (tiny.yaml:3): there is no such key; did you mean models?"),
        (MODELS, "", "tiny.yaml: it compares nothing, for it has no `models`; models=A,B on the command line names them"),
        ("mamba:\n", "mamba: [model=mamba, model.d_modle=8]\n",
         "models.mamba (tiny.yaml:5): model.d_modle: lab.models.Stack has no such argument; did you mean model.d_model?"),
        ("[model=transformer,", "[model=tranformer,",
         "models.attention (tiny.yaml:4): model=tranformer: there is no such option; did you mean transformer?"),
        ("mamba:\n", "mamba: [seed=3]\n", "models.mamba (tiny.yaml:5): seed is not of a model: it is the same for all of them"),
        ("mamba:\n", "mamba: model=mamba\n",
         "models.mamba (tiny.yaml:5): expected a list of words as of lab-train, such as [model=mamba], got 'model=mamba'"),
        ("mamba:\n", "mamba: [model=mamba, task.seq_len=32]\n",
         "models.mamba (tiny.yaml:5): its task.seq_len is 32, and 16 of attention: models are compared on one task"),
        ("mamba:\n", "mamba: [model=mamba, task.n_test=10]\n", "models.mamba (tiny.yaml:5): its task.n_test is 10, and "),
        ("mamba:\n", "mamba: [model=transformer, model.max_len=16]\n",
         "models.mamba (tiny.yaml:5): it is attention under another name: their configs are the same"),
        ("seeds: 2", "seeds: [1, 1]", "seeds (tiny.yaml:6): expected a list of different seeds, or how many, got [1, 1]"),
        ("claim:", "clam:", "expect.0.clam (tiny.yaml:8): there is no such key; did you mean claim?"),
        (FIRST, FIRST.replace("match", "macth"),
         "expect.0.metric (tiny.yaml:8): mamba has no score exact_macth on CopyReverse; did you mean exact_match?"),
        (FIRST, FIRST.replace("exact_match", "sync"),
         "expect.0.metric (tiny.yaml:8): mamba has no score sync on CopyReverse; it has: ce_loss, exact_match, exact_match_free"),
        (FIRST, FIRST.removeprefix("test/"),
         "expect.0.metric (tiny.yaml:8): exact_match names no split; did you mean test/exact_match?"),
        ("scale: 2", "scale: 4", "expect.0.scale (tiny.yaml:8): length 64 is not scored; task.eval_lengths and task.seq_len give 16, 32"),
        (SECOND, SECOND.replace("att", "at"),
         "expect.1.over (tiny.yaml:9): there is no model atention in models; did you mean attention?"),
        (SECOND, "over: attention, ", "expect.1 (tiny.yaml:9): it has no bound; at_least or at_most gives one"),
        ("at_least: 0.9, source: a book", "at_least: 0.9",
         "expect.0.source (tiny.yaml:8): it is missing; an expectation has metric, model, a bound and source"),
        ("at_least: 0.9", "at_least: .nan", "expect.0.at_least (tiny.yaml:8): expected a finite number, got nan; leave out a bound"),
        ("at_least: 0.9", "at_least: most", "expect.0.at_least (tiny.yaml:8): expected a number, got 'most'"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_one_sentence(old, new, sentence, file, capsys):
    assert old in FILE
    file.write_text(FILE.replace(old, new))
    assert mistake(["tiny.yaml"], capsys).startswith(sentence)  # the options may follow


def test_a_mistake_in_the_words_is_one_sentence(capsys):
    assert mistake(["tiny.yaml", "models=mamb"], capsys).endswith("there is no model mamb in the file; did you mean mamba?")
    for seeds in ("a", "0", "1,1", "[]"):
        assert "expected different seeds, as seeds=1,2,3 or seeds=[3], or how many" in mistake(["tiny.yaml", f"seeds={seeds}"], capsys)
    assert "at least 1" in mistake(["tiny.yaml", "n_jobs=0"], capsys)
    assert mistake(["tiny.yaml", "seed=1"], capsys).endswith("seeds=1,2,3 says which there are")
    assert mistake(["tiny.yaml", "trainer.max_step=3"], capsys).endswith("did you mean trainer.max_steps?")
    assert "got none" in mistake([], capsys) and "no such file" in mistake(["tiy.yaml"], capsys)
    assert "leave out tiny.yaml" in mistake(["--show", "runs", "tiny.yaml"], capsys)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("models=lot sedes=2", "sedes (command line): there is no such key; did you mean seeds?"),
        ("models=lot thread=2", "thread (command line): there is no such key; did you mean threads?"),
        ("modles=lot,mamba", "modles (command line): there is no such key; did you mean models?"),
        ("model=lot,mamba seeds=2", "model (command line): one for all of them compares nothing; did you mean models=lot,mamba?"),
        ("model=lot", "model (command line): one for all of them compares nothing; did you mean models=lot?"),
        ("model=lot models=mamba,s4", "model (command line): one for all of them compares nothing; leave it out"),
        ("models=lot,mambo", "models (command line): there is no model mambo; did you mean mamba?"),
        ("models=lot,lot", "models (command line): lot is named 2 times"),
        ("models=", "models (command line): expected names, as models=lot,mamba, got none"),
        ("", f"{ROOT}/experiments/copy_reverse_small.yaml: it compares nothing, for it has no `models`"),
    ],
)
def test_a_mistake_in_the_words_of_an_experiment_without_models(words, sentence, capsys):
    assert mistake(["experiment=copy_reverse_small", *words.split()], capsys).startswith(sentence)


PAIRS = "pairs: [[a, c], [c, b]]"
THREE = FILE.partition("models:")[0] + "models: {a: [model=lot], b: [model=mamba], c: [model=s4d]}\nseeds: 2\n" + PAIRS + "\n"


def test_which_pairs_are_compared(file, capsys):
    file.write_text(THREE)
    assert comparison_words.read(["tiny.yaml"]).pairs == [("a", "c"), ("c", "b")]
    assert comparison_words.read(["tiny.yaml", "models=a,c"]).pairs == [("a", "c")]  # of those that are left
    assert comparison_words.read(["tiny.yaml", "pairs=b"]).pairs == [("a", "b"), ("c", "b")]
    file.write_text(THREE.replace(PAIRS, "pairs: c"))
    assert comparison_words.read(["tiny.yaml"]).pairs == [("a", "c"), ("b", "c")]
    file.write_text(THREE.replace(PAIRS, ""))
    assert comparison_words.read(["tiny.yaml"]).pairs == [("a", "b"), ("a", "c"), ("b", "c")]
    assert "pairs" not in compose(["--config=tiny.yaml"]).config
    assert mistake(["tiny.yaml", "pairs=d"], capsys).startswith("pairs (command line): expected one of the models, with which each other")


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        ("d", "there is no model d in models; there are: a, b, c"),
        ("[[a, d]]", "there is no model d in models; there are: a, b, c"),
        ("[[a, a]]", "a and a are one model"),
        ("[[[a], b]]", "expected a name of models, with which each other one is compared, or [[a, b], ...], got [[['a'], 'b']]"),
        ("[[a, b], [b, a]]", "a and b are compared twice"),
        ("[a, b]", "expected a name of models, with which each other one is compared, or [[a, b], ...], got ['a', 'b']"),
    ],
)
def test_a_mistake_in_the_pairs_is_one_sentence(pairs, sentence, file, capsys):
    file.write_text(THREE.replace(PAIRS, f"pairs: {pairs}"))
    assert mistake(["tiny.yaml"], capsys) == f"pairs (tiny.yaml:5): {sentence}"


def test_too_few_seeds_are_told_before_anything_runs(file):
    file.write_text(THREE)
    assert comparison_words.read(["tiny.yaml"]).too_few == (
        "with 2 seeds no difference of 2 pairs can be significant, it takes 7; with fewer pairs, as of pairs=NAME, fewer will do"
    )
    assert (
        comparison_words.read(["tiny.yaml", "seeds=7"]).too_few is None and comparison_words.read(["tiny.yaml", "models=a"]).too_few is None
    )
    assert "no two of these models are asked about; pairs=NAME" in comparison_words.read(["tiny.yaml", "models=a,b", "seeds=9"]).too_few
    assert (
        comparison_words.read(["tiny.yaml", "models=a,c", "seeds=1"]).too_few == "with 1 seed no difference can be significant, it takes 6"
    )


def test_any_experiment_is_compared():
    read = comparison_words.read(["experiment=copy_reverse_small", "models=lot,transformer,mamba", "seeds=8", "trainer.max_steps=3"])
    assert read.models == {name: [f"model={name}"] for name in ("lot", "transformer", "mamba")} and read.seeds == [*range(1, 9)]
    assert read.shared == ["experiment=copy_reverse_small", "trainer.max_steps=3"] and read.name == "copy_reverse_small"
    assert read.metrics == ["test/token_accuracy"] and read.expectations == []


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("model.max_len=32", "model.max_len"),
        ("model={dropout: 0.1, max_len: 32}", "model.max_len"),
        ("model.mixer.n_heads=2", "model.mixer.n_heads"),
        ("model=lot", "model"),
    ],
)
def test_a_word_that_a_model_would_not_hear_is_refused(word, key, file, capsys):
    file.write_text(FILE.replace("model.max_len=16]", "model.max_len=16, 'model.mixer={n_heads: 4}']"))
    sentence = f"{key} (command line): attention has a word of its own for it in tiny.yaml; change that one, or leave out attention"
    assert mistake(["tiny.yaml", word], capsys) == sentence


def test_a_word_that_all_models_hear_is_not_refused():
    words = ["tiny.yaml", "model.d_model=16", "model={dropout: 0.1}"]
    assert comparison_words.read(words).shared == ["--config=tiny.yaml", *words[1:]]
    assert comparison_words.read(["tiny.yaml", "models=mamba", "model.max_len=32"]).models == {"mamba": ["model=mamba"]}


def test_seeds_read_the_same_in_the_file_and_on_the_command_line(file):
    for typed, seeds in (("3", [1, 2, 3]), ("[3]", [3]), ("[3, 1]", [3, 1])):
        assert comparison_words.read(["tiny.yaml", f"seeds={typed}"]).seeds == seeds
        file.write_text(FILE.replace("seeds: 2", f"seeds: {typed}"))
        assert comparison_words.read(["tiny.yaml"]).seeds == seeds
    assert comparison_words.read(["tiny.yaml", "seeds=3,1"]).seeds == [3, 1]


def test_lab_train_sees_the_experiment_alone(file):
    config = compose(["--config=tiny.yaml", "model=mamba"]).config
    assert not {"models", "seeds", "expect"} & set(config) and config["task"]["seq_len"] == 16
    file.write_text("seeds: 3\nexpect: []\n")  # no comparison: a mistyped key stays one
    assert "seeds" in compose(["--config=tiny.yaml"]).config


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_the_comparisons_of_the_repository(path):
    """All models compose, and each expectation is of something that is scored."""
    read = comparison_words.read([f"experiment={path.parent.name}/{path.stem}"])
    assert len(read.models) >= 2 and len(read.seeds) >= (3 if path.parent.name == "repro" else 8)
    assert read.expectations if path.parent.name == "repro" else read.too_few is None
