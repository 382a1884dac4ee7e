"""What lab-compare is asked for: its words and the file that they name, checked before a run begins."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lab.analysis.comparison import Comparison
from lab.analysis.expectations import Expectation, parse
from lab.analysis.metrics import score_names
from lab.config import Composed, ConfigError, MistakeError, check, compose, files, first_difference, overrides
from lab.config.defaults import COMPARISON
from lab.config.errors import hint
from lab.config.identity import relevant
from lab.config.layers import Layer, saying_where
from lab.config.overrides import SHELL, places_of
from lab.config.tree import dotted
from lab.sweeps.multirun import OF_A_RUN
from lab.tasks import Task
from lab.training.experiment import Experiment, build_node

OPTIONS = ("models", "seeds", "pairs", "n_jobs", "threads")  # words of lab-compare itself


def read_all(words: Sequence[str]) -> list[Comparison]:
    """A comparison of each FILE (or experiment=NAME), in this order, with all KEY=VALUE ...; as `read` otherwise."""
    files = [word for word in words if _names_a_file(word)]
    if not files:
        raise ConfigError("lab-compare takes a file, or experiment=NAME; got none")
    others = [word for word in words if word not in files]
    return [read([file, *others]) for file in dict.fromkeys(files)]


def _names_a_file(word: str) -> bool:
    return word.startswith("experiment=") or ("=" not in word and not word.startswith("~"))


def read(words: Sequence[str]) -> Comparison:
    """The comparison of FILE (or experiment=NAME), the first of the words, and KEY=VALUE ...; ConfigError, in one sentence, for any mistake
    in the words or the file that can be known before a run begins."""
    file, shared, own = _sort(words)
    tree, layer = _load(file)
    _check_words(shared, own, layer, named="models" in tree)
    with saying_where([layer]):
        models, seeds = _models(tree) if "models" in tree else _named(own["models"]), _seeds(tree)
        expectations = parse(tree.get("expect", []), list(models))
        in_file = _pairs(tree["pairs"], models) if "pairs" in tree else list(combinations(models, 2))
        chosen, seeds = _chosen(own, models), _typed_seeds(own["seeds"]) if "seeds" in own else seeds
        n_jobs, threads = _positive("n_jobs", own.get("n_jobs", "1")), _positive("threads", own["threads"]) if "threads" in own else None
        check(compose(shared, matching=False))  # a mistake in what all have in common is not one of a model
        for model in chosen:
            _check_heard(shared, model, models[model], layer.name)
        composed = {name: _composed(name, models[name], shared) for name in chosen}
        tasks: dict[str, Task] = {name: _built("task", name, composed[name]) for name in chosen}
        for index, expectation in enumerate(expectations):
            for name in (expectation.model, expectation.over):
                if name in tasks:
                    _check_score(("expect", index), expectation, tasks[name], name, composed[name])
        first = next(iter(tasks.values()))
        for name in chosen[1:]:
            _check_beside(chosen[: chosen.index(name)], name, composed)
    pairs = _typed_pairs(own["pairs"], chosen) if "pairs" in own else [pair for pair in in_file if {*pair} <= {*chosen}]
    lengths = {task.seq_len * scale for task in tasks.values() for scale in (1, *task.eval_lengths)}
    metrics = list(dict.fromkeys(expectation.metric for expectation in expectations)) or [f"test/{[*first.metrics, 'ce_loss'][0]}"]
    return Comparison(
        name=files.experiment_name(file).rpartition("/")[2],
        words=list(words),
        shared=shared,
        models={name: models[name] for name in chosen},
        seeds=seeds,
        pairs=pairs,
        expectations=expectations,
        lengths=sorted(lengths),
        metrics=metrics,
        seq_len=first.seq_len,
        n_jobs=n_jobs,
        threads=threads,
    )


def _sort(words: Sequence[str]) -> tuple[Path, list[str], dict[str, str]]:
    """The file, the words of lab-train, and lab-compare's own."""
    first, *others = words
    name = first.removeprefix("experiment=")
    file = files.option_file(files.options(), "experiment", name, SHELL) if name != first else Path(first)
    shared: list[str] = []
    own: dict[str, str] = {}
    for word in others:
        key, _, value = word.partition("=")
        if key in OPTIONS:
            own[key] = value
        elif key in OF_A_RUN or key == "seed":
            reason = OF_A_RUN.get(key, "seeds=1,2,3 says which there are")
            raise ConfigError(f"{key} ({SHELL}): not of a comparison: {reason}")
        else:
            shared.append(word)
    return file, [first if name != first else f"--config={first}", *shared], own


def _load(file: Path) -> tuple[dict[str, Any], Layer]:
    content: Any = OmegaConf.to_container(files.load(file), resolve=False)
    layer, known = Layer(files.show(file), content, files.lines(file)), [*COMPARISON, *(f.name for f in fields(Experiment)), "defaults"]
    with saying_where([layer]):
        for key in content:
            if key not in known:
                raise MistakeError((key,), f"there is no such key{hint(str(key), known)}")
    return content, layer


def _check_words(shared: Sequence[str], own: Mapping[str, str], layer: Layer, named: bool) -> None:
    """ConfigError for a word that was meant to be lab-compare's own. named: whether the file says which models there are."""
    known = {*OPTIONS, *(f.name for f in fields(Experiment)), *files.options()} - {"seed", "experiment"}
    for word in shared[1:]:
        key, _, value = word.lstrip("+").partition("=")
        if re.fullmatch(r"\w+", key) and key not in known:
            raise ConfigError(f"{key} ({SHELL}): there is no such key{hint(key, known)}")
        if key == "model" and not value.startswith("{") and ("," in value or not named):
            instead = "leave it out" if "models" in own else f"did you mean models={value}?"
            raise ConfigError(f"model ({SHELL}): one for all of them compares nothing; {instead}")
    if not named and "models" not in own:
        raise ConfigError(f"{layer.name}: it compares nothing, for it has no `models`; models=A,B on the command line names them")


def _named(text: str) -> dict[str, list[str]]:
    """models=A,B where the file has none: options of the group `model`."""
    options = files.options()["model"]
    for name in _listed(text):
        if name not in options:
            raise ConfigError(f"models ({SHELL}): there is no model {name}{hint(name, options, 'there are')}")
    return {name: [f"model={name}"] for name in _listed(text)}


def _listed(text: str) -> list[str]:
    names = [name.strip() for name in text.strip("[]").split(",")]
    if "" in names:
        raise ConfigError(f"models ({SHELL}): expected names, as models=lot,mamba, got {text or 'none'}")
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"models ({SHELL}): {name} is named {names.count(name)} times")
    return names


def _models(tree: Mapping[str, Any]) -> dict[str, list[str]]:
    given = tree["models"]
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        if twice := [name for name in given if given.count(name) > 1]:
            raise MistakeError(("models",), f"{twice[0]} is named {given.count(twice[0])} times")
        given = dict.fromkeys(given)
    if not isinstance(given, dict) or not given:
        raise MistakeError(("models",), "expected names, each with its words of lab-train, as `mamba: [model=mamba, model.d_model=64]`")
    for name, words in given.items():
        if words is not None and not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise MistakeError(("models", name), f"expected a list of words as of lab-train, such as [model={name}], got {words!r}")
        for word in words or ():
            key = word.lstrip("+~").partition("=")[0]
            if key in (*OF_A_RUN, "seed", "experiment"):
                raise MistakeError(("models", name), f"{key} is not of a model: it is the same for all of them")
    return {str(name): [f"model={name}"] if words is None else list(words) for name, words in given.items()}


def _seeds(tree: Mapping[str, Any]) -> list[int]:
    seeds = tree.get("seeds", 1)
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds >= 1:
        return list(range(1, seeds + 1))
    if isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds) and len(set(seeds)) == len(seeds):
        return seeds
    raise MistakeError(("seeds",), f"expected a list of different seeds, or how many, got {seeds!r}")


def _pairs(given: Any, models: Mapping[str, Any]) -> list[tuple[str, str]]:
    if isinstance(given, str):
        given = [[name, given] for name in models if name != given] if given in models else [[given, given]]
    texts = isinstance(given, list) and all(isinstance(pair, list) and all(isinstance(name, str) for name in pair) for pair in given)
    if not texts or not all(len(pair) == 2 for pair in given):
        raise MistakeError(("pairs",), f"expected a name of models, with which each other one is compared, or [[a, b], ...], got {given!r}")
    for name in (name for pair in given for name in pair):
        if name not in models:
            raise MistakeError(("pairs",), f"there is no model {name} in models{hint(str(name), models, 'there are')}")
    pairs = [(a, b) for a, b in given]
    for a, b in pairs:
        if a == b or sum({a, b} == {*pair} for pair in pairs) > 1:
            raise MistakeError(("pairs",), f"{a} and {b} are one model" if a == b else f"{a} and {b} are compared twice")
    return pairs


def _typed_pairs(name: str, chosen: Sequence[str]) -> list[tuple[str, str]]:
    if name not in chosen:
        raise ConfigError(f"pairs ({SHELL}): expected one of the models, with which each other one is compared{hint(name, chosen)}")
    return [(other, name) for other in chosen if other != name]


def _chosen(own: Mapping[str, str], models: Mapping[str, Any]) -> list[str]:
    names = _listed(own["models"]) if "models" in own else list(models)
    for name in names:
        if name not in models:
            raise ConfigError(f"models ({SHELL}): there is no model {name} in the file{hint(name, models, 'there are')}")
    return names


def _typed_seeds(text: str) -> list[int]:
    """As in the file: a bare number is how many, and a list, with brackets or a comma, names them."""
    if text.isdecimal() and int(text) >= 1:
        return list(range(1, int(text) + 1))
    numbers = [number.strip() for number in text.strip("[]").split(",")]
    if text.isdecimal() or not all(number.isdecimal() for number in numbers) or len({int(number) for number in numbers}) < len(numbers):
        raise ConfigError(f"seeds ({SHELL}): expected different seeds, as seeds=1,2,3 or seeds=[3], or how many, as seeds=3, got {text}")
    return [int(number) for number in numbers]


def _positive(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{key} ({SHELL}): expected a whole number of at least 1, got {text}")
    return int(text)


def _composed(name: str, words: list[str], shared: list[str]) -> Composed:
    """The config of a model's runs; a mistake in the words of the model is told as one of the file."""
    with _saying_whose(name):
        composed = compose([*shared, *words])
        check(composed)
    return composed


def _built(node: str, name: str, composed: Composed) -> Any:
    with _saying_whose(name), composed.saying_where():
        return build_node(node, composed.config[node], None)


@contextmanager
def _saying_whose(name: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise MistakeError(("models", name), str(error).replace(f" ({SHELL})", "")) from None


def _check_beside(others: Sequence[str], name: str, composed: Mapping[str, Composed]) -> None:
    """MistakeError for a model on another task than those before it, or that is one of them under another name."""
    mine, theirs = (relevant(composed[each].stored) for each in (name, others[0]))
    for key in [*mine, *theirs]:
        if key.startswith("task.") and key != "task.source" and mine.get(key) != theirs.get(key):
            there = f"its {key} is {mine.get(key)}, and {theirs.get(key)} of {others[0]}"
            raise MistakeError(("models", name), f"{there}: models are compared on one task")
    for other in others:
        if first_difference(composed[name].stored, composed[other].stored) is None:
            raise MistakeError(("models", name), f"it is {other} under another name: their configs are the same")


def _check_heard(shared: list[str], name: str, words: list[str], file: str) -> None:
    """ConfigError for a word of the command line that the words of a model would override."""
    with _saying_whose(name):
        given, mine = overrides.read(shared), overrides.read(words)
    its_own = [key for value in mine.values for key in places_of(value)]
    unheard = [choice for choice in given.choices if choice in mine.choices]
    unheard += [
        dotted(key) for value in given.values for key in places_of(value) if any(key[: len(own)] == own[: len(key)] for own in its_own)
    ]
    if unheard:
        raise ConfigError(f"{unheard[0]} ({SHELL}): {name} has a word of its own for it in {file}; change that one, or leave out {name}")


def _check_score(key: tuple[Any, ...], expectation: Expectation, task: Task, model: str, composed: Composed) -> None:
    if expectation.name not in score_names(task):  # a loss of the model's own, perhaps
        names = score_names(task, _built("model", model, composed))
        if expectation.name not in names:
            problem = f"{model} has no score {expectation.name} on {type(task).__name__}"
            raise MistakeError((*key, "metric"), problem + hint(expectation.name, names, "it has"))
    length = expectation.input_length(task.seq_len)
    lengths = [task.seq_len * scale for scale in sorted({1, *task.eval_lengths})]
    if length not in lengths:
        asked = "length" if expectation.length is not None else "scale"
        scored = ", ".join(map(str, lengths))
        raise MistakeError((*key, asked), f"length {length} is not scored; task.eval_lengths and task.seq_len give {scored}")
