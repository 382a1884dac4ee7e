"""The sections of a study on the page: the question, the answer, the models, the charts, the runs and where they ran."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from lab.analysis.page import charts
from lab.analysis.page.charts import Panel, View, mean_cost
from lab.analysis.page.markup import Child, el
from lab.analysis.page.runs import RunView
from lab.analysis.page.studies import Study, is_share, lower_is_better
from lab.analysis.page.svg import COLOURS, LONGEST, swatch
from lab.analysis.page.tables import SHORT, cell, cells_of, head_of, is_number, scrolling, table
from lab.analysis.report import number
from lab.analysis.statistics import in_figures

VERDICTS = {"held": "✓", "not held": "✗", "cannot tell": "?"}
STATUS = {"done": "✓", "failed": "✗"}


def sections(study: Study, key: str, level: int) -> list[Element]:
    """key: what the ids of this study begin with. level: of its headings."""
    titled = (
        ("answer", "What was found", _answer(study)),
        ("models", "Models", _models(study)),
        ("learning", "Learning curves", _learning(study, key)),
        ("length", "By length", _by_length(study)),
        ("within", *_by_table(study)),
        ("cost", "Cost against quality", _cost(study, key)),
        ("runs", "Every run", _runs(study)),
        ("environment", "Where it ran", _environments(study)),
    )
    return [
        el("section", el(f"h{level}", heading), *content, id=f"{key}-{name}", aria_label=heading)
        for name, heading, content in titled
        if content
    ]


# ----------------------------------------------------------------------- words


def question(study: Study) -> list[Element]:
    """What was compared, on what, and what became of the runs."""
    tasks = sorted(
        {str(run.config["task"]["_target_"]).rpartition(".")[2] for run in study.runs if "_target_" in run.config.get("task", {})}
    )
    seeds = list(dict.fromkeys(run.seed for run in study.runs if run.seed is not None))
    said: list[Child] = [_listed(list(study.models)) if study.models else "No model"]
    said += [f" on {_listed(tasks)}"] if tasks else []
    said += [f", {how}" for how in [_trained(study)] if how]
    said += [f"; {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"] if seeds else []
    counted = Counter(run.status for run in study.runs)
    total = len(study.runs)
    became = f"{total} run{'s' if total != 1 else ''}: " + ", ".join(f"{n} {status}" for status, n in counted.items())
    lead = el("p", *said, ". ", el("span", became, class_="warn" if set(counted) - {"done"} else None), ".", class_="lead")
    again = [el("p", "All of it again: ", _command(study.command))] if study.command else []
    return [lead, *again]


def _trained(study: Study) -> str:
    """How, as far as all runs have it in common."""

    def common(node: str, name: str) -> Any:
        values = {json.dumps(run.config[node].get(name)) for run in study.runs if isinstance(run.config.get(node), dict)}
        return json.loads(values.pop()) if len(values) == 1 else None

    steps, batch, length = common("trainer", "max_steps"), common("trainer", "batch_size"), study.seq_len
    parts = [
        f"on sequences of {length:,}" if length else "",
        f"for {steps:,} steps" if steps else "",
        f"of {batch:,} rows" if batch else "",
    ]
    return "trained " + " ".join(filter(None, parts)) if any(parts) else ""


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def _answer(study: Study) -> list[Element]:
    found: list[Element] = []
    places: dict[str, list[Element]] = {}
    for pair in sorted(study.pairs, key=lambda pair: pair["length"] != study.seq_len):  # those at the length of training first
        length = f" at length {pair['length']:,}" if pair.get("length") else ""
        places.setdefault(f"{pair['metric']}{length}", []).append(el("li", str(pair["text"])))
    for i, (place, sentences) in enumerate(places.items()):
        said = el("ul", *sentences, class_="findings")
        found += [el("p", f"{place}:"), said] if i == 0 else [_folded(place, said)]
    if study.pairs:
        found.append(_folded("All pairs in numbers", _pairs(study.pairs), el("p", f"{study.test}.", class_="note")))
    else:
        found += [el("p", sentence) for sentence in _ranked(study)]
    if study.expectations:
        counted = Counter(each["verdict"] for each in study.expectations)
        heading = ", ".join(f"{counted[verdict]} {verdict}" for verdict in VERDICTS if counted[verdict])
        found += [el("p", f"Of what was expected: {heading}."), el("ul", [_claim(each) for each in study.expectations], class_="claims")]
    return found


def _ranked(study: Study) -> list[str]:
    """The scores of the models in their order, where no pair was tested."""
    found = []
    for metric in study.metrics[:2]:
        lengths: list[int | None] = [*study.lengths(metric)] or [None]
        for length in dict.fromkeys([study.seq_len if study.seq_len in lengths else lengths[0], lengths[-1]]):
            lines = [line for model in study.models if (line := study.line(model, metric, length))]
            lines.sort(key=lambda line: line["mean"], reverse=not lower_is_better(metric))
            where = f" at length {length:,}" if length is not None else ""
            scores = ", ".join(f"{line['model']} {' '.join(_figures(metric, line))}" for line in lines)
            if lines:
                found.append(f"{metric}{where}, the best first: {scores}.")
    if found and len(study.models) > 1:
        found.append("No pair was tested: the order may be chance.")
    return found


def _claim(each: Mapping[str, Any]) -> Element:
    metric = str(each["metric"])
    measured = f"found {' '.join(_figures(metric, each))}, n {each['n']}" if each["n"] else "no score"
    said: list[Child] = [el("strong", str(each["verdict"])), " ", str(each.get("claim") or each["text"])]
    detail = f"{each['text']}; {measured}" + (f" ({each['why']})" if each.get("why") else "")
    mark = el("span", VERDICTS.get(each["verdict"], "?"), class_="sign", aria_hidden="true")
    source: list[Child] = [" ", el("cite", str(each["source"]))] if each.get("source") else []
    return el("li", mark, el("div", *said, el("small", detail, source)), class_=str(each["verdict"]).replace(" ", "-"))


def _pairs(pairs: Iterable[Mapping[str, Any]]) -> Element:
    head = ["a", "b", "score", "length", "n", "a − b", "95 % interval", "p", "p (Holm)", "effect"]
    rows = []
    for pair in pairs:
        low, high = pair.get("low"), pair.get("high")
        spread = f"[{number(float(low))}, {number(float(high))}]" if low is not None and high is not None else ""
        numbers = [cell(pair.get(name)) for name in ("p", "p_holm", "effect")]
        rows.append(
            [pair["a"], pair["b"], pair["metric"], cell(pair.get("length")), cell(pair["n"]), cell(pair["difference"]), spread, *numbers]
        )
    return table(head, rows, "Paired differences, a − b of the same seed")


# ----------------------------------------------------------------------- models


def _models(study: Study) -> list[Element]:
    if not study.models:
        return []
    places = [(metric, length) for metric in study.metrics for length in _at_training(study, metric)]
    columns: list[tuple[str, Callable[[str], Child]]] = [
        ("parameters", lambda model: cell(mean_cost(study, model, lambda run: run.params), "{:,.0f}")),
        ("FLOPs a token", lambda model: cell(mean_cost(study, model, lambda run: run.cost.get("flops_per_token")), SHORT)),
        ("state", lambda model: _state(study.of(model))),
        ("tokens/s", lambda model: cell(mean_cost(study, model, lambda run: run.speed), "{:,.0f}")),
        ("seconds a run", lambda model: cell(mean_cost(study, model, lambda run: run.seconds), "{:,.0f}")),
        ("runs done", lambda model: f"{len(study.of(model))} of {sum(run.model == model and run.counts for run in study.runs)}"),
    ]
    filled = {head: [of(model) for model in study.models] for head, of in columns}
    kept = {head: column for head, column in filled.items() if any(each is not None for each in column)}
    kept |= {metric.replace("/", " "): [_score(study, model, metric, length) for model in study.models] for metric, length in places}
    rows = [[_named(study, model), *(column[i] for column in kept.values())] for i, model in enumerate(study.models)]
    notes = [f"Scores: {study.method}; of the checkpoint that validation chose, the test split took no part in that."]
    notes += ["State: of one sequence, after the shortest and the longest length it was counted for."] if "state" in kept else []
    notes += ["Tokens/s: the median of training, of a machine that may have had other work."] if "tokens/s" in kept else []
    references = {name: value for run in study.runs for name, value in run.references.items()}
    notes += [f"Without a model: {', '.join(f'{name} {number(value)}' for name, value in references.items())}."] if references else []
    published = {name: entry for run in study.runs for name, entry in run.published.items()}
    scores = [f"{name} {number(entry['value'])} ({entry['source']})" for name, entry in published.items()]
    said = [el("p", f"Published: {'; '.join(scores)}.", class_="note")] if scores else []
    where = f" at length {study.seq_len:,}" if study.seq_len else ""
    return [table(["model", *kept], rows, f"The models{where}"), el("p", " ".join(notes), class_="note"), *said]


def _at_training(study: Study, metric: str) -> list[Any]:
    """The length whose score is in the table of models: that of training, or the only one that there is."""
    lengths = list(dict.fromkeys(line["length"] for line in study.summary if line["metric"] == metric))
    return [study.seq_len] if study.seq_len in lengths else lengths[:1]


def _named(study: Study, model: str, words: bool = True) -> Element:
    said = " ".join(study.models[model] or []) if words else ""
    own = el("small", said) if said not in ("", f"model={model}") else None
    return el("span", swatch(list(study.models).index(model)), f"\u00a0{model}", own, class_="model" if len(model) <= LONGEST else None)


def _state(runs: Sequence[RunView]) -> str | None:
    """2.1 kB … 67 kB"""
    known = [run.cost["state_bytes"] for run in runs if "state_bytes" in run.cost]
    if not known:
        return None
    of_lengths = known[0] or {}
    sizes = [of_lengths[length] for length in sorted(of_lengths, key=int) if of_lengths[length] is not None]
    if not sizes:
        return "none"
    ends = [size_of(size) for size in dict.fromkeys([sizes[0], sizes[-1]])]
    return " … ".join(dict.fromkeys(ends))


def size_of(n: float) -> str:
    for unit, letters in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= unit:
            return f"{n / unit:.3g} {letters}"
    return f"{n:.0f} B"


def _score(study: Study, model: str, metric: str, length: Any) -> Child:
    line = study.line(model, metric, length)
    if line is None:
        why = next((run.test[str(length)] for run in study.of(model) if isinstance(run.test.get(str(length)), str)), None)
        return el("span", "—", title=why) if why else None
    values = ", ".join(f"seed {seed}: {number(value)}" for seed, value in zip(line.get("seeds", []), line.get("values", []), strict=False))
    mean, *interval = _figures(metric, line)
    return el("span", mean, *(el("span", f" {each}", class_="interval") for each in interval), title=values, data_v=line["mean"])


def score(metric: str, value: float) -> str:
    """0.9810 of a share; of another score, four digits."""
    return f"{value:.4f}" if is_share(metric) else number(float(value))


def _figures(metric: str, line: Mapping[str, Any]) -> list[str]:
    """The mean, and its interval where there is one."""
    low, high = line.get("low"), line.get("high")
    if low is None or high is None:
        return [score(metric, line["mean"])]
    return in_figures(line["mean"], low, high).split(" ", 1)


# ----------------------------------------------------------------------- charts


def _learning(study: Study, key: str) -> list[Element]:
    views = charts.learning(study)
    note = "Validation. The line is the mean over the seeds, the band its 95 % interval; a band that leaves the frame is cut."
    return [_figure(study, views, f"{key}-x", "horizontal axis", note)] if views else []


def _by_length(study: Study) -> list[Element]:
    panels = charts.by_length(study)
    if not panels:
        return []
    tables = []
    for metric in study.metrics:
        lengths = study.lengths(metric)
        if len(lengths) > 1:
            rows = [
                [_named(study, model, words=False), *(_score(study, model, metric, length) for length in lengths)] for model in study.models
            ]
            tables.append(table(["model", *(f"{length:,}" for length in lengths)], rows, f"{metric} by length of the input"))
    note = f"Trained on {study.seq_len:,}." if study.seq_len else ""
    return [_figure(study, [View("", panels)], "", "", note), *tables]


def _by_table(study: Study) -> tuple[str, list[Element]]:
    panels = charts.by_table(study)
    heading = f"By {_listed([panel.title.removeprefix('accuracy by ') for panel in panels])}"
    return heading, [_figure(study, [View("", panels)], "", "", "On the test split, at the length of training.")] if panels else []


def _cost(study: Study, key: str) -> list[Element]:
    views = charts.costs(study) if len(study.models) > 1 else []
    note = "Means over the seeds with their 95 % intervals. The state is that after the shortest length it was counted for."
    return [_figure(study, views, f"{key}-cost", "cost", note)] if views else []


def _figure(study: Study, views: Sequence[View], name: str, what: str, note: str) -> Element:
    """One view at a time, chosen by radio buttons and the style sheet alone."""
    caption = el("figcaption", note)
    if len(study.models) > COLOURS or any(len(model) > LONGEST for model in study.models):
        names = [el("span", swatch(i), " ", model) for i, model in enumerate(study.models)]
        caption = el("figcaption", el("span", *names, class_="legend"), note)
    shown = [el("div", [_panel(panel) for panel in view.panels], class_="panels") for view in views]
    if len(views) == 1:
        return el("figure", *shown, caption)
    choices: list[Element] = []
    for i, view in enumerate(views):
        choices.append(el("input", type="radio", name=name, id=f"{name}-{i}", checked=i == 0))
        choices.append(el("label", view.name, for_=f"{name}-{i}"))
    return el("figure", el("div", *choices, el("div", *shown, class_="views"), class_="switch", role="group", aria_label=what), caption)


def _panel(panel: Panel) -> Element:
    return el("div", el("p", panel.title, class_="title"), panel.picture, class_="panel")


# ----------------------------------------------------------------------- runs


def _runs(study: Study) -> list[Element]:
    """Each run is two rows: its numbers; why it failed, the command that gives it again, its folder."""
    environments = _distinct(study)
    columns: dict[str, list[Child]] = {
        "model": [run.model for run in study.runs],
        "seed": [cell(run.seed) for run in study.runs],
        "status": [f"{STATUS[run.status]} {run.status}" if run.status in STATUS else run.status for run in study.runs],
        "steps": [cell(run.step) for run in study.runs],
        "seconds": [cell(run.seconds, "{:,.1f}") for run in study.runs],
        "tokens/s": [cell(run.speed, "{:,.0f}") for run in study.runs],
        "val ce_loss": [cell(run.val.get("ce_loss")) for run in study.runs],
    }
    for metric in study.metrics:
        if metric.startswith("test/"):
            columns[metric.replace("/", " ")] = [_tested(run, metric, study.seq_len) for run in study.runs]
    columns["backends"] = [backends(run.backends) for run in study.runs]
    columns["code"] = [run.code for run in study.runs]
    columns["commit"] = [run.commit for run in study.runs]
    if len(environments) > 1:
        columns["where"] = [_letter(environments.index(run.env)) if run.env else None for run in study.runs]
    kept = {head: cells for head, cells in columns.items() if any(each is not None for each in cells)}
    numbers = {i for i, head in enumerate(kept) if all(map(is_number, kept[head]))}
    bodies = []
    for i, run in enumerate(study.runs):
        cells = cells_of([column[i] for column in kept.values()], numbers)
        more = el("tr", el("td", el("div", *_more(run), class_="more"), colspan=len(kept)))
        bodies.append(el("tbody", el("tr", *cells), more, class_=None if run.done else "missing"))
    note = "lab-eval RUN, of the folder that the command then names, gives the test scores. code: a digest of the package's sources."
    whole = el("table", el("caption", "The runs, each with its command"), head_of(list(kept), numbers), *bodies, class_="sortable runs")
    return [scrolling(whole), el("p", note, class_="note")]


def _tested(run: RunView, metric: str, length: Any) -> Element | None:
    scores = run.test.get(str(length))
    value = scores.get(metric.removeprefix("test/")) if isinstance(scores, dict) else None
    return el("span", score(metric, value), data_v=value) if isinstance(value, int | float) else None


def _more(run: RunView) -> list[Element]:
    found = [el("p", f"{run.status}: {run.reason}", class_="reason")] if run.reason else []
    if not run.counts:
        found.append(el("p", "another run of this seed counts: it is newer, or done", class_="reason"))
    if run.command:
        found.append(el("p", _command(run.command)))
    return [*found, el("small", run.folder), *(el("small", f"resumed {how}") for how in run.resumed)]


def backends(used: Mapping[str, Any]) -> str | None:
    """native: causal_conv, selective_scan"""
    by_backend: dict[str, list[str]] = {}
    for op, backend in used.items():
        by_backend.setdefault(str(backend), []).append(op)
    return "; ".join(f"{backend}: {', '.join(ops)}" for backend, ops in by_backend.items()) or None


def _distinct(study: Study) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for run in study.runs:
        if run.env and run.env not in found:
            found.append(run.env)
    return found


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"A{index}"


def _environments(study: Study) -> list[Element]:
    """A column for each environment that runs had."""
    environments = _distinct(study)
    if not environments:
        return []
    names = list(dict.fromkeys(name for env in environments for name in env))
    rows: list[list[Child]] = [[name, *(str(env.get(name, "")) for env in environments)] for name in names]
    counts = [sum(run.env == env for run in study.runs) for env in environments]
    head = ["", *(f"{_letter(i)} ({n} runs)" for i, n in enumerate(counts))] if len(environments) > 1 else ["", "all runs"]
    return [table(head, rows, "Versions and machines", sortable=False)]


def _command(command: str) -> Element:
    return el("code", command, class_="command")


def _folded(summary: str, *content: Element) -> Element:
    return el("details", el("summary", summary), *content)
