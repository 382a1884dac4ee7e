"""lab-report --html: one page that asks for nothing else, with every run, score and command in it, and no markup but its own."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from lab.analysis.comparison import FILE
from lab.analysis.page import document as pages
from lab.analysis.page.document import page
from lab.analysis.page.runs import plain
from lab.analysis.page.studies import studies, thinned
from lab.analysis.page.svg import Axis, Point, Series, chart, decades, short, steps
from lab.analysis.pairs import pairs
from lab.cli import report as lab_report

EVIL = "<script>alert('x')</script>"
LENGTHS = (8, 16)
VOID = {"meta", "input", "br"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(path, model="lot", seed=1, accuracy=0.75, status="done", reason=None, env="1.0", **config):
    """A run folder as training and lab-eval leave it."""
    folder = Path(path)
    (folder / "eval").mkdir(parents=True)
    stored = {"seed": seed, "model": {"_target_": f"lab.{model}", "d_model": 8}, "task": {"_target_": "lab.tasks.Copy", "seq_len": 8}}
    stored |= {"trainer": {"max_steps": 20, "batch_size": 4}, "optimizer": {"lr": 0.1}} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    command = f"lab-train model={model} seed={seed} run_dir={path}"
    hparams = {"choices": {"model": model, "task": "copy"}, "code_version": "aaaa", "git_commit": None, "command": command}
    (folder / "hparams.yaml").write_text(yaml.safe_dump(hparams))
    (folder / "job.json").write_text(json.dumps({"status": status, "reason": reason, "step": 20, "seconds": 12.5, "host": "here"}))
    rows = [{"step": 10, "train/tokens_per_second": 1234.0}]
    for step in (10, 20):
        row = {
            "step": step,
            "val/ce_loss": 1 / step,
            "val/token_accuracy": accuracy,
            "train/tokens": 32 * step,
            "train/seconds": 0.5 * step,
        }
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {str(n): {"ce_loss": 0.5, "token_accuracy": accuracy * 8 / n} for n in LENGTHS}
    found = {"params": 4321, "metrics": scores["8"], "by_length": scores, "by_position": [None, 0.5, accuracy], "env": {"torch": env}}
    found |= {"backends": {"causal_conv": "native"}, "references": {"best constant": 0.125}, "code_version": "aaaa"}
    found |= {"cost": {"flops_per_token": 8765, "state_bytes": {"8": 640, "32": 2560}}}
    (folder / "metrics.json").write_text(json.dumps(found))
    if status == "done":
        (folder / "eval" / "test-best.json").write_text(json.dumps(found))
    return folder


def compared(**more):
    """runs/comparisons/mine_1, of two models and two seeds; the second run of b failed."""
    scores = {"a": {1: 0.75, 2: 0.8125}, EVIL: {1: 0.5, 2: 0.25}}
    runs, summary = [], []
    for model, of_seeds in scores.items():
        for seed, accuracy in of_seeds.items():
            failed = model == EVIL and seed == 2
            folder = Path("runs/x") / f"{len(runs)}"
            make(folder, "lot", seed, accuracy, *(["failed", f"the loss is nan {EVIL}"] if failed else []))
            run = {"model": model, "seed": seed, "folder": str(folder), "command": f"lab-train model={len(runs)} seed={seed}"}
            run |= {"status": "failed" if failed else "done", "reason": None, "step": 20, "params": 4321, "seconds": 12.5, "references": {}}
            runs.append(run | {"val": {}, "test": {str(n): {"token_accuracy": accuracy * 8 / n} for n in LENGTHS} if not failed else {}})
        for n in LENGTHS:
            values = [run["test"][str(n)]["token_accuracy"] for run in runs if run["model"] == model and run["test"]]
            line = {"model": model, "metric": "test/token_accuracy", "length": n, "seeds": [1, 2][: len(values)], "values": values}
            ends = {"low": 0.6, "high": 0.9} if len(values) > 1 else {"low": None, "high": None}
            summary.append(line | {"n": len(values), "mean": sum(values) / len(values)} | ends)
    claim = {
        "metric": "test/token_accuracy",
        "model": "a",
        "source": "arXiv:0",
        "claim": f"a learns it {EVIL}",
        "text": "a: >= 0.7",
        "n": 2,
    }
    claim |= {"mean": 0.78125, "low": 0.6, "high": 0.9, "verdict": "cannot tell", "why": "the interval is on both sides of the bound"}
    document = {
        "name": "mine",
        "command": "lab-compare mine.yaml",
        "method": "means",
        "test": "p: of signs",
        "planned": [],
        "pairs": [],
        "curves": [],
        "seeds": [1, 2],
        "models": {"a": ["model=lot"], EVIL: []},
        "seq_len": 8,
    }
    document |= {"metrics": ["test/token_accuracy"], "runs": runs, "summary": summary, "expectations": [claim], **more}
    folder = Path("runs/comparisons/mine_1")
    folder.mkdir(parents=True)
    (folder / FILE).write_text(json.dumps(document))
    return folder


class Walk(HTMLParser):
    """What a browser would see: elements with their attributes, and text; AssertionError for a tag that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_it_asks_for_nothing_else():
    compared()
    text = page(["runs/comparisons/mine_1"])
    walked = Walk(text)
    assert not re.search(r"https?:|//\w|@import|url\(", text.replace("// Nothing here", ""))
    outside = [value for _, given in walked.elements for name, value in given.items() if name in ("src", "href", "xlink:href", "action")]
    assert outside and all(value.startswith("#") for value in outside)
    anchors = {given.get("id") for _, given in walked.elements}
    assert {value[1:] for value in outside} <= anchors
    (policy,) = (given["content"] for given in walked.of("meta") if "http-equiv" in given)
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert not {"img", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in walked.elements}


def test_the_policy_is_that_of_its_own_style_and_script():
    """Otherwise the browser shows the page without them."""
    make("runs/a")
    text = page(["runs"])
    for name in ("style", "script"):
        inner = re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)[1]
        assert pages._digest(inner) in text
    assert " style=" not in text and " onclick=" not in text  # neither of which the policy lets through


def test_no_text_of_a_run_becomes_markup():
    make("runs/alone", seed=f"1{EVIL}", status="failed", reason=f"{EVIL} \x1b[31mred\x00 \ud800")
    compared()
    walked = Walk(page(["runs"]))
    assert len(walked.of("script")) == 1 and EVIL in walked.words
    assert "\x1b" not in walked.words and "red" in walked.words
    assert all(EVIL not in given.get("class", "") for _, given in walked.elements if given.get("class"))


def test_a_comparison_answers_first():
    scores = {"a": {1: 0.75, 2: 0.8125}, EVIL: {1: 0.5, 2: 0.25}}
    compared(pairs=pairs(scores, [("a", EVIL)], "test/token_accuracy", 8, 2), curves=[])
    walked = Walk(page(["runs/comparisons/mine_1"]))
    said = walked.words
    sentence = pairs(scores, [("a", EVIL)], "test/token_accuracy", 8, 2)[0]["text"]
    assert " ".join(sentence.split()) in said and said.index(sentence[:20]) < said.index("The models at length 8")
    assert f"cannot tell a learns it {EVIL}" in said and "arXiv:0" in said and "the interval is on both sides" in said
    assert "4 runs: 3 done, 1 failed" in said and "lab-compare mine.yaml" in said and "p: of signs." in said
    assert "0.781 [0.600, 0.900]" in said  # the mean of a at the length of training
    assert "0.391 [0.600, 0.900]" in said and "0.2500" in said  # at twice the length


def test_every_run_is_there_with_its_command():
    compared()
    said = Walk(page([f"runs/comparisons/mine_1/{FILE}"])).words
    for i in range(4):
        assert f"lab-train model={i} seed={i % 2 + 1}" in said and f"runs/x/{i}" in said
    assert f"failed: the loss is nan {EVIL}" in said
    cells = "4,321|8,765|640 B … 2.56 kB|1,234|12.5|native: causal_conv|aaaa|here|0.8125|best constant 0.125"
    for cell in cells.split("|"):
        assert cell in said, cell


def test_where_no_pair_was_asked_about():
    compared()
    said = Walk(page(["runs"])).words
    assert "No pair was tested" in said and "Learning curves" in said
    assert f"the best first: a 0.781 [0.600, 0.900], {EVIL} 0.5000" in said


def test_a_comparison_that_travelled_without_its_runs():
    folder = compared()
    shutil.rmtree("runs/x")
    said = Walk(page([str(folder)])).words
    assert "4 runs: 3 done, 1 failed" in said and "lab-train model=3 seed=2" in said and "0.8125" in said and said.count("12.5") >= 4
    (folder / FILE).write_text("{")
    assert lab_report.main([str(folder), "--html", "page.html"]) == 1 and not Path("page.html").exists()


def test_any_runs_are_grouped_by_data_and_named_by_what_differs(capsys):
    for seed in (1, 2, 3):
        make(f"runs/a{seed}", seed=seed, accuracy=0.5 + 0.125 * seed)
        make(f"runs/b{seed}", seed=seed, accuracy=0.25, optimizer={"lr": 0.01})
    make("runs/other", task={"_target_": "lab.tasks.Copy", "seq_len": 16})
    make("runs/again", seed=3, accuracy=0.0)
    first, second = studies(["runs"])
    assert list(first.models) == ["lot lr=0.1", "lot lr=0.01"] and (first.title, second.title) == ("copy, seq_len 8", "copy, seq_len 16")
    line = first.line("lot lr=0.1", "test/token_accuracy", 8)
    assert line["n"] == 3 and line["mean"] == 0.75 and line["low"] < 0.75 < line["high"]
    assert [run.folder for run in first.runs if not run.counts] == ["runs/again"]
    assert {(each["metric"], each["x"]) for each in first.curves} >= {("val/ce_loss", "seconds"), ("val/token_accuracy", "tokens")}
    assert lab_report.main(["runs", "--html", "sub/page.html"]) == 0
    assert capsys.readouterr().out == "written to sub/page.html\n"
    said = Walk(Path("sub/page.html").read_text()).words
    assert "another run of this seed counts" in said and said.count("lab-train model=lot seed=1") == 3  # without their run_dir


def test_runs_that_lack_almost_everything_are_rows():
    make("runs/fine")
    torn = make("runs/torn", seed=2)
    for name in ("metrics.json", "eval/test-best.json", "job.json"):
        (torn / name).write_text("[")
    (torn / "metrics.jsonl").write_text('{"step": 1, "val/ce_loss": null}\n[]\n')
    Path("runs/empty").mkdir()
    said = Walk(page(["runs", "runs/empty"])).words
    assert "runs/torn" in said and "is not valid JSON" in said and "there is no run in this folder" in said
    assert lab_report.main(["runs/empty", "--html", "page.html"]) == 1


def test_environments_that_differ_have_letters():
    make("runs/a", seed=1), make("runs/b", seed=2, env="2.0")
    said = Walk(page(["runs"])).words
    assert "A (1 runs) B (1 runs)" in said and "torch 1.0 2.0" in said


def test_charts_have_tooltips_and_words_and_one_view_at_a_time():
    compared()
    text = page(["runs/comparisons/mine_1"])
    walked = Walk(text)
    pictures = [given for given in walked.of("svg") if given.get("role") == "img"]
    assert pictures and all(given["aria-label"] for given in pictures)
    assert "a, length 16: 0.391 [0.600, 0.900], n 2" in walked.words
    chosen = {given["name"]: 0 for given in walked.of("input")}
    for given in walked.of("input"):
        chosen[given["name"]] += "checked" in given
        assert any(label["for"] == given["id"] for label in walked.of("label"))
    assert chosen == {"s0-x": 1, "s0-cost": 1}
    assert [given["id"] for given in walked.of("input")].count("s0-cost-3") == 1  # parameters, FLOPs, state, seconds


def test_both_schemes_have_every_colour():
    css = pages._file("page.css")
    light, dark = (set(re.findall(r"(--[\w-]+):", block)) for block in re.findall(r":root \{(.*?)\n *\}", css, re.DOTALL)[:2])
    assert "prefers-color-scheme: dark" in css and "@media print" in css
    assert dark == light - {"--serif", "--sans", "--mono"} and {f"--c{i}" for i in range(8)} <= dark
    assert set(re.findall(r"var\((--[\w-]+)\)", css)) <= light | {"--c"}
    body = css[css.index("* {") : css.index("@media print")]
    assert not re.search(r"#[0-9a-f]{3,8}\b", body)


def test_a_chart_holds_its_points():
    """Inside of the frame, also where an interval reaches beyond what there can be."""
    points = [Point(1, 0.5, -3, 4, "one"), Point(10, 1.0, 0.9, 1.1, "two")]
    drawn = chart([Series("a", 0, points)], Axis("x", "log"), Axis("", low=0, high=1), "words")
    numbers = [
        float(n)
        for path in drawn.iter("path")
        if path.get("class", "").startswith(("band", "line"))
        for n in re.findall(r"-?[\d.]+", path.get("d"))
    ]
    assert min(numbers) >= 0 and max(numbers) <= 400
    assert [title.text for title in drawn.iter("title")] == ["one", "two"] and drawn.get("aria-label") == "words"
    same = chart([Series("a", 0, [Point(0, 0, 0, 0)])], Axis("x"), Axis(""), "one value, and no spread", lines=False)
    assert "nan" not in " ".join(path.get("d") for path in same.iter("path"))


def test_ticks_are_round():
    assert steps(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert decades(0.001, 10) == [0.001, 0.01, 0.1, 1, 10] and len(decades(20, 90)) >= 3
    assert [short(n) for n in (0, 0.05, 1234, 65984, 1.5e6, 2e9)] == ["0", "0.05", "1,234", "66k", "1.5M", "2G"]
    near = chart([Series("a", 0, [Point(n, 1, 1, 1) for n in (106_792, 106_840)])], Axis("x"), Axis(""), "two of a size", lines=False)
    labels = [text.text for text in near.iter("text") if text.get("class") == "tick x"]
    assert len(labels) == len({*labels}) >= 2 and all(label.startswith("106.8") for label in labels)
    assert thinned(list(range(100)), 5) == [0, 25, 50, 74, 99] and thinned([1, 2], 5) == [1, 2]


def test_a_command_without_its_folder():
    assert plain("lab-train 'a=b c' run_dir=x fresh=true seed=1") == "lab-train 'a=b c' seed=1"
    assert plain("lab-train 'unclosed") == "lab-train 'unclosed"


def test_html_stands_alone(capsys):
    make("runs/a")
    assert lab_report.main(["runs", "--html", "page.html", "--by-seed"]) == 2
    assert "leave out --by-seed" in capsys.readouterr().err
    assert lab_report.main(["runz", "--html", "page.html"]) == 1
    assert capsys.readouterr().err == "lab-report: runz: there is no such run, sweep or folder\n"
