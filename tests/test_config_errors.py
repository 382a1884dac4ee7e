"""One clear sentence for each mistake: the key, where it was set, what would be right."""

from __future__ import annotations

import config_tree
import pytest
from config_tree import checked, message, toy_root, write

from lab.config import ConfigError, check, compose

home, user = config_tree.home, config_tree.user  # fixtures

SHELL = "(command line)"
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    # names
    "key": (["model.n_layer=3"], ["model.n_layer", SHELL, "toy.Model has no such argument", "did you mean model.n_layers?"]),
    "key+": (["+model.n_layer=3"], ["model.n_layer", SHELL, "did you mean model.n_layers?"]),
    "key++": (["++model.n_layer=3"], ["model.n_layer", SHELL, "did you mean model.n_layers?"]),
    "nested key": (["model.mixer.n_head=3"], [SHELL, "toy.Lattice has no such argument", "did you mean model.mixer.n_heads?"]),
    "key in braces": (["model.mixer={n_head: 3}"], ["model.mixer.n_head", SHELL, "did you mean model.mixer.n_heads?"]),
    "root key": (["sed=3"], ["sed", SHELL, "did you mean seed?"]),
    "root+": (["++foo.bar=1"], ["foo.bar", SHELL, "there is no such key; valid: callbacks,"]),
    "group name": (["modle=lot"], ["modle", SHELL, "did you mean model?"]),
    "group name of a node": (["modle.d_model=1"], ["did you mean model.d_model?"]),
    "key without its node": (["lr=3"], ["lr", SHELL, "did you mean optimizer.lr?"]),
    "key in another node": (["model.lr=3"], ["did you mean optimizer.lr?"]),
    "reserved": (["model.mixer._partal_=true"], ["did you mean model.mixer._partial_?"]),
    "flag": (["model.mixer._partial_=yess"], ["model.mixer._partial_", "expected true or false, got 'yess'"]),
    "two mistakes in a key": (["model.n_layer=3", "model.n_layer=abc"], ["model.n_layer", "did you mean model.n_layers?"]),
    # choices
    "option": (["model=transfomer"], ["model=transfomer", SHELL, "did you mean transformer?", "lot, transformer"]),
    "experiment": (["experiment=smal"], ["experiment=smal", SHELL, "did you mean small?", "none, repro/induction, small"]),
    "far experiment": (["experiment=zzz"], ["there is no such option; options: none, repro/induction, small"]),
    "inner option": (["mixer@model.mixer=latice"], ["mixer@model.mixer=latice", SHELL, "did you mean lattice?"]),
    "inner option of no group": (["mixr@model.mixer=lattice"], ["there is no group mixr", "did you mean mixer?"]),
    "inner group, plain": (["mixer=attention"], [SHELL, "did you mean mixer@model.mixer=attention?"]),
    "inner group, elsewhere": (["mixer@model.mixr=attention"], [SHELL, "did you mean mixer@model.mixer=attention?"]),
    "inner node": (["model.mixer=attention"], [SHELL, "got 'attention'; an option is chosen by mixer@model.mixer=attention"]),
    "null for a group that may go": (["callbacks=null"], [SHELL, "the name of one option: default; ~callbacks goes without"]),
    "null option": (["model=null"], ["model=null", SHELL, "the name of one option: lot, transformer"]),
    "two options": (["model=[lot,transformer]"], ["the name of one option"]),
    "deleted choice": (["~mixer@model.mixer"], ["~mixer@model.mixer", "the name of one option"]),
    "deleted node": (["~model"], ["model", "it is missing; it must be a node with _target_ (a Model)"]),
    "file as a name": (["experiment=small.yaml"], ["a file is given by --config small.yaml"]),
    "file as a word": (["small.yaml"], ["expected key=value; a file is given by --config small.yaml"]),
    "no such file": (["--config=smal.yaml"], ["smal.yaml: there is no such file"]),
    "two experiments": (["--config=x.yaml", "experiment=small"], ["two are given, x and small"]),
    # types
    "text for int": (["model.d_model=abc"], ["model.d_model", SHELL, "expected an int, got 'abc'"]),
    "quoted int": (["model.d_model='8'"], ["expected an int, got '8', a text; remove its quotes"]),
    "bool for int": (["model.d_model=true"], ["expected an int, got true"]),
    "int for bool": (["trainer.compile=1"], ["expected true or false, got 1"]),
    "float for int": (["model.d_model=0.5"], ["expected an int, got 0.5"]),
    "whole float for int": (["trainer.max_steps=1e4"], ["expected an int or null, got 10000.0; write 10000"]),
    "bool for float": (["optimizer.lr=true"], ["optimizer.lr", "expected a number, got true"]),
    "null for int": (["model.d_model=null"], ["expected an int, got null"]),
    "optional": (["trainer.max_steps=soon"], ["expected an int or null, got 'soon'"]),
    "list for int": (["model.d_model=[1]"], ["expected an int, got [1]"]),
    "int for list": (["model.mixer.shape=2"], ["model.mixer.shape", "expected a list (an int each) or null, got 2"]),
    "item": (["model.mixer.shape=[2,x]"], ["model.mixer.shape.1", SHELL, "expected an int, got 'x'"]),
    "text for list": (["task.lengths=ab"], ["expected a list (an int each), got 'ab'"]),
    "short tuple": (["model.sizes=[1]"], ["expected a list of 2 values, got [1]"]),
    "item of a tuple": (["model.sizes=[1.5,1]"], ["model.sizes.0", "expected an int, got 1.5"]),
    "literal": (["model.mixer.mode=wav"], ["model.mixer.mode", "expected wave or gain, got 'wav'; did you mean wave?"]),
    "bool for a literal": (["model.level=true"], ["model.level", "expected 0 or 1, got true"]),
    "literal or bool": (["trainer.deterministic=wrn"], ["expected true or false or warn", "did you mean warn?"]),
    "value for a node": (["model=3"], ["the name of one option"]),
    "value for a callable": (["model.mixer=3"], [SHELL, "expected a node with _target_ and `_partial_: true` (of a Mixer), got 3"]),
    "dict for a value": (["seed.foo=1"], ["seed", SHELL, 'expected an int, got {"foo": 1}']),
    "mapping of ints": (["model.names={a: b}"], ["model.names.a", "expected an int, got 'b'"]),
    "other class": (["model._target_=toy.Task"], ["model", SHELL, "expected a node with _target_ (a Model), got a toy.Task"]),
    "other partial": (["model.mixer._target_=toy.Task"], ["model.mixer", SHELL, "(of a Mixer), got a partial toy.Task"]),
    "no partial": (["model.mixer._partial_=false"], ["model.mixer", SHELL, "`_partial_: true` is missing"]),
    "partial": (["+task._partial_=true"], ["task", SHELL, "(a Task), got a partial toy.Task"]),
    "known names of **kwargs": (["model.mixer={_target_: toy.Loose, width: x}"], ["model.mixer.width", "expected an int, got 'x'"]),
    "late": (["callbacks.progress.every=x"], ["callbacks.progress.every", SHELL, "expected an int, got 'x'"]),
    "late name": (["callbacks.progress.evry=3"], ["did you mean callbacks.progress.every?"]),
    # targets
    "class": (["model._target_=toy.Modle"], ["model._target_", SHELL, "toy has no Modle; did you mean Model?"]),
    "module": (["model._target_=toyy.Model"], ["there is no module toyy; did you mean toy?"]),
    "class of lab": (["model.mixer._target_=lab.mixrs.Lattice"], ["model.mixer._target_", "lab has no mixrs; did you mean mixers?"]),
    "module for a class": (["model._target_=json"], ["json is not a class or function"]),
    "not a name": (["model._target_='a b'"], ["'a b' is not the dotted name"]),
    "number for a target": (["model._target_=3"], ["model._target_", "3 is not the dotted name"]),
    # missing
    "missing value": (["task=own"], ["task.data (", "own.yaml:1): it is not set; it must be a node such as +task.data._target_=your"]),
    "missing argument": (["~model.d_model"], ["model.d_model (", "configs/model/lot.yaml:6)", "toy.Model needs it; it must be an int"]),
    "missing where used": (["task.vocab_size=???"], ["${task.vocab_size} refers to a value that is missing; set task.vocab_size=..."]),
    # grammar
    "no sign": (["foo"], ["foo", SHELL, "expected key=value"]),
    "no key": (["=3"], ["is not a key"]),
    "odd key": (["a[0]=3"], ["'a[0]' is not a key"]),
    "option sign": (["--foo=3"], ["'--foo' is not a key"]),
    "open bracket": (["task.lengths=[1"], ["task.lengths", SHELL, "cannot read the value [1; a list is 'task.lengths=[1,2]'"]),
    "parenthesis": (["run_dir=a(b)"], ["cannot read the value a(b)"]),
    "sweep": (["seed=1,2"], ["seed", SHELL, "1,2 is several values, which -m trains one by one; a list is 'seed=[1,2]'"]),
    "range": (["seed=range(1,3)"], ["is several values"]),
    "list item": (["task.lengths.7=1"], ["task.lengths.7", "there is no such place"]),
    "nothing to delete": (["~model.d_modle"], ["~model.d_modle", SHELL, "no such key to delete; did you mean d_model?"]),
    "other value to delete": (["~model.d_model=3"], ["its value is 128, not 3"]),
    "key of a stranger": (["hydr.run.dir=x"], ["hydr.run.dir", "there is no such key"]),
    # interpolation
    "reference": (["run_dir=${task.vocabsize}"], [SHELL, "does not exist; did you mean task.vocab_size?"]),
    "relative reference": (["model.d_model=${.nlayers}"], ["model.d_model", SHELL, "${.nlayers} cannot be resolved"]),
    "resolver": (["run_dir=${env:HOME}"], ["run_dir", SHELL, "unknown resolver; did you mean oc.env?"]),
    "environment": (["run_dir=${oc.env:LAB_NO_SUCH}"], ["run_dir", SHELL, "needs the environment variable LAB_NO_SUCH, which is not set"]),
    "circle": (["seed=${run_dir}", "run_dir=${seed}"], ["refers to itself"]),
    "escaped": (["run_dir='\\${seed}'"], ["run_dir", "can contain the text ${"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_on_the_command_line(user, name):
    words, parts = MISTAKES[name]
    write(user, {"x.yaml": "seed: 1"})
    text = message(*words)
    for part in parts:
        assert part in text, text


def test_settings_of_hydra_are_refused(user):
    for word in ("hydra.run.dir=x", "hydra/launcher=basic", "hydra=x", "+hydra.verbose=true"):
        with pytest.raises(ConfigError, match="have no effect here; run_dir=PATH"):
            compose([word])


FILES: dict[str, tuple[dict[str, str], list[str], list[str]]] = {
    "key": ({"experiments/x.yaml": "model:\n  n_layer: 3"}, ["experiment=x"],
            ["model.n_layer (experiments/x.yaml:2)", "did you mean model.n_layers?"]),
    "root key": ({"experiments/x.yaml": "sed: 3"}, ["experiment=x"], ["sed (experiments/x.yaml:1)", "did you mean seed?"]),
    "type": ({"experiments/x.yaml": "seed: '3'"}, ["experiment=x"], ["seed (experiments/x.yaml:1)", "expected an int, got '3', a text"]),
    "by file": ({"a/x.yaml": "# mine\nmodle: {}"}, ["--config=a/x.yaml"], ["modle (a/x.yaml:2)", "did you mean model?"]),
    "in a list": ({"experiments/x.yaml": "task:\n  lengths:\n  - 1\n  - x"}, ["experiment=x"], ["task.lengths.1 (experiments/x.yaml:4)"]),
    "own option": ({"configs/task/mine.yaml": "_target_: toy.Task\nvocab_size: 7\nlenghts: [1]"}, ["task=mine"],
                   ["task.lenghts (configs/task/mine.yaml:3)", "did you mean task.lengths?"]),
    "own target": ({"configs/task/mine.yaml": "_target_: toy.Tsk\nvocab_size: 1"}, ["task=mine"],
                   ["task._target_ (configs/task/mine.yaml:1)", "toy has no Tsk; did you mean Task?"]),
    "own missing argument": ({"configs/task/mine.yaml": "_target_: toy.Task\nvocab_size: 7"}, ["task=mine"],
                             ["task.lengths (configs/task/mine.yaml:1)", "toy.Task needs it; it must be a list (an int each)"]),
    "own missing object": ({"own.py": "import toy\nclass T(toy.Task):\n def __init__(self, vocab_size, data): ...",
                            "configs/task/mine.yaml": "_target_: own.T\nvocab_size: 7"}, ["task=mine"],
                           ["own.T needs it; it must be a node such as +task.data._target_=yourmodule.Class, or a plain value"]),
    "the word wins": ({"experiments/x.yaml": "seed: a"}, ["experiment=x", "seed=b"], ["seed (command line)", "got 'b'"]),
    "choice as a value": ({"experiments/x.yaml": "model: transformer"}, ["experiment=x"],
                          ["model (experiments/x.yaml:1)", "got 'transformer'; an option is chosen by model=transformer",
                           "`override /model: transformer`"]),
    "inner choice as a value": ({"experiments/x.yaml": "model: {mixer: attention}"}, ["experiment=x"],
                                ["chosen by mixer@model.mixer=attention"]),
    "yaml": ({"experiments/x.yaml": "model:\n  a: [1\n  b: 2"}, ["experiment=x"], ["experiments/x.yaml, line 3: not valid YAML"]),
    "yaml by file": ({"x.yaml": "a: 1\n\tb: 2"}, ["--config=x.yaml"], ["x.yaml, line 2: not valid YAML"]),
    "yaml of an option": ({"configs/task/mine.yaml": "a: 1\nb: ]"}, ["task=mine"], ["configs/task/mine.yaml, line 2: not valid YAML"]),
    "key twice": ({"experiments/x.yaml": "seed: 1\nseed: 2"}, ["experiment=x"], ["experiments/x.yaml, line 2", "duplicate key seed"]),
    "list": ({"experiments/x.yaml": "- 1"}, ["experiment=x"], ["expected lines of the form `key: value`, got sequence"]),
    "word": ({"experiments/x.yaml": "abc"}, ["experiment=x"], ["got scalar"]),
    "number": ({"experiments/x.yaml": "3"}, ["experiment=x"], ["got scalar"]),
    "braces": ({"experiments/x.yaml": "seed: ${task.x"}, ["experiment=x"], ["experiments/x.yaml: seed: malformed interpolation"]),
    "reference": ({"experiments/x.yaml": "seed: ${sed}"}, ["experiment=x"], ["seed (experiments/x.yaml:1)", "did you mean seed?"]),
    "overridden option": ({"experiments/x.yaml": "defaults: [override /model: transfomer]"}, ["experiment=x"],
                          ["model=transfomer (experiments/x.yaml)", "did you mean transformer?"]),
    "overridden inner option": ({"experiments/x.yaml": "defaults: [override /mixer@model.mixer: atention]"}, ["experiment=x"],
                                ["mixer@model.mixer=atention (experiments/x.yaml)", "did you mean attention?"]),
    "overridden group": ({"experiments/x.yaml": "defaults: [override /modle: lot]"}, ["experiment=x"],
                         ["override /modle: lot (experiments/x.yaml)", "did you mean model?"]),
    "overridden plain inner group": ({"experiments/x.yaml": "defaults: [override /mixer: attention]"}, ["experiment=x"],
                                     ["(experiments/x.yaml)", "did you mean mixer@model.mixer?"]),
    "override forgotten": ({"experiments/x.yaml": "defaults: [/model: transformer]"}, ["experiment=x"],
                           ["/model: transformer (experiments/x.yaml)", "write `override /model: transformer`"]),
    "slash forgotten": ({"experiments/x.yaml": "defaults: [override model: transformer]"}, ["experiment=x"],
                        ["(experiments/x.yaml)", "write `override /model: transformer`, with the slash"]),
    "order": ({"experiments/x.yaml": "defaults: [override /model: lot, small]"}, ["experiment=x"],
              ["defaults (experiments/x.yaml): lines with `override` must come last"]),
    "base": ({"experiments/x.yaml": "defaults: [smal]"}, ["experiment=x"], ["experiment=smal (experiments/x.yaml)", "did you mean small?"]),
    "defaults": ({"experiments/x.yaml": "defaults: {model: lot}"}, ["experiment=x"], ["defaults (experiments/x.yaml): ", "must be a list"]),
    "line of the defaults": ({"experiments/x.yaml": "defaults: [3]"}, ["experiment=x"], ["(experiments/x.yaml): ", "of the form"]),
    "option in an option": ({"configs/model/mine.yaml": "# @package _global_\ndefaults: [/mixer@model.mixer: latice]"}, ["model=mine"],
                            ["mixer@model.mixer=latice (configs/model/mine.yaml)", "did you mean lattice?"]),
    "package below a comment": ({"configs/model/mine.yaml": "# mine\n# @package _global_\nmodel: {_target_: toy.Model}"}, ["model=mine"],
                                ["configs/model/mine.yaml: `# @package ...` must be the first line"]),
    "package below, chosen by a file": ({"configs/model/mine.yaml": "model: {}\n# @package _global_",
                                         "experiments/x.yaml": "defaults: [override /model: mine, override /mixer@model.mixer: lattice]"},
                                        ["experiment=x"], ["configs/model/mine.yaml: `# @package ...` must be the first line"]),
    "module": ({"broken.py": "import nosuch", "experiments/x.yaml": "model: {_target_: broken.A}"}, ["experiment=x"],
               ["model._target_ (experiments/x.yaml:1)", "broken.A cannot be imported: No module named 'nosuch'"]),
    "syntax": ({"broken.py": "def", "experiments/x.yaml": "model: {_target_: broken.A}"}, ["experiment=x"],
               ["broken.A cannot be imported: SyntaxError"]),
    "near file": ({"x.yaml": ""}, ["--config=xx.yaml"], ["xx.yaml: there is no such file; did you mean x.yaml?"]),
    "not text": ({"x.yaml": "a: \x00"}, ["--config=x.yaml"], ["x.yaml: not valid YAML"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_mistakes_in_files(user, name):
    contents, words, parts = FILES[name]
    write(user, contents)
    text = message(*words)
    for part in parts:
        assert part in text, text


def test_blank_lines_may_stand_above_the_package(user, home):
    text = (home / "configs/model/lot.yaml").read_text()
    write(user, {"configs/model/mine.yaml": "# @other x\n\n" + text + "# the package is above"})
    assert checked("model=mine").config["model"]["d_model"] == 128


def test_a_broken_experiment_disturbs_no_other(user):
    write(user, {"experiments/broken.yaml": "a: ["})
    checked("experiment=small")


@pytest.mark.parametrize(
    "lines",
    [
        "[3]", "[null]", "[[1]]", "[{}]", "[{1: lot}]", "[{/model: 3}]", "[{/model: lot, /task: copy}]", "[{override /task/x: y}]",
        "[{override task/x: y}]", "[x]", "[/experiment: x]", "[/task: copy, /task: copy]", "[/model/lto]",
        "[{/mixer@model.other: latice}]", "[{override /mixer@_global_: lattice}]", "['']", "[{'': lot}]", "[{/task: '???'}]",
        "[{/task: '${no}'}]", "[{override /model: '${no}'}]", "[optional /nothing: {}]",
    ],
)  # fmt: skip
def test_any_odd_defaults_list_is_one_line(user, lines):
    write(user, {"experiments/x.yaml": f"defaults: {lines}"})
    with pytest.raises(ConfigError) as error:
        compose(["experiment=x"])
    assert "\n" not in str(error.value) and "x" in str(error.value)


def test_an_optional_line_may_name_nothing(user):
    write(user, {"experiments/x.yaml": "defaults: [optional /task@other: nothing, small]"})
    assert compose(["experiment=x"]).config["model"]["n_layers"] == 2


def test_what_hydra_alone_notices_is_one_line_too(user):
    write(user, {"experiments/x.yaml": "defaults: [_self_, _self_]"})
    with pytest.raises(ConfigError, match="the defaults lists of experiment=x do not compose: .*_self_") as error:
        compose(["experiment=x"])
    assert "\n" not in str(error.value)


def test_a_plain_config_is_checked_without_origins(user):
    config = checked("experiment=small").config
    config["model"]["d_model"] = "x"
    with pytest.raises(ConfigError, match="^model.d_model: expected an int, got 'x'$"):
        check(config, root=toy_root())
