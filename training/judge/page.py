"""The results as one HTML page that needs nothing beside it, and as a table for the terminal."""
from __future__ import annotations

import base64
import io
import math
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from .measures import MEASURES
from .published import TABLES

SHOWN = 200  # samples of a task whose pictures are on the page; results.json has all samples
SIDE = 448   # px: longest side of a picture on the page
TITLES = {"reconstruction": "Reconstructions", "edits": "Edits"}
# A name in a sample's folder -> its label on the page. Presets and modes keep their names.
NAMES = {"source": "source", "target": "true edit", "vae": "autoencoder alone", "unedited": "embedding unedited"}
WHAT = {
    "vae": "its round trip: the ceiling of what Flux can paint",
    "unedited": "Flux under the unedited embedding",
    "source": "the source itself, nothing done: what an edit has to beat",
}

SOURCE = "<span class='left'>source</span>"


def number(value: float | None) -> str:
    if value is None:
        return "-"
    if math.isinf(value):
        return "equal"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}"


def table(results: dict) -> str:
    """The table of means for the terminal."""
    lines = []
    for name, task in results["tasks"].items():
        measures = measures_of(task)
        rows = [[f"{TITLES[name]} ({task['count']})", *(MEASURES[m].label for m in measures)]]
        rows += [[NAMES.get(method, method), *(number(means[m]["mean"]) if m in means else "-" for m in measures)]
                 for method, means in task["means"].items()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines += ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        lines += [f"left out: {each['measure']}: give --{each['key']} {each['needs']}" for each in task["missing"]]
    return "\n".join(lines)


def measures_of(task: dict) -> list[str]:
    """The measures that any method of a task has, in their order."""
    return [name for name in MEASURES if any(name in means for means in task["means"].values())]


def page(results: dict, folder: Path) -> str:
    """The whole page. Pictures are read from `folder`/pictures."""
    tasks = results["tasks"]
    counts = " and ".join(f"{task['count']} {TITLES[name].lower()}" for name, task in tasks.items())
    published = _published(tasks)
    links = {f"{name}-pictures": f"{TITLES[name]} side by side" for name in tasks}
    links |= {"published": "Published figures"} if published else {}
    parts = [f"<nav>{''.join(f'<a href=#{key}>{words}</a>' for key, words in links.items())}</nav>"]
    parts += [_task(name, task) for name, task in tasks.items()]
    parts += [_protocol(results), published]
    parts += [_gallery(name, task, folder / "pictures" / name) for name, task in tasks.items()]
    return Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title=" and ".join(TITLES[name] for name in tasks), body="\n".join(parts),
        subtitle=escape(f"{counts}, by {results['protocol']['adapter'].split(',')[0]}, {results['made']}"))


def _table(head: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """A table. head and cells are HTML. Every row has a class."""
    lines = [f"<tr class='{kind}'>{''.join(cells)}</tr>" for kind, cells in rows]
    return (f"<div class='wide'><table><thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table></div>")


def _cell(inside: str, kind: str = "") -> str:
    return f"<td class='{kind}'>{inside}</td>" if kind else f"<td>{inside}</td>"


def _head(measures: list[str]) -> list[str]:
    arrows = {"higher": "&uarr;", "lower": "&darr;"}
    chosen = [MEASURES[m] for m in measures]
    return [f"<span title='{escape(it.what)}'>{escape(it.label)} {arrows[it.better]}</span>" for it in chosen]


def _mean(means: dict, measure: str) -> str:
    if measure not in means:
        return _cell("-")
    it = means[measure]
    error = "" if it["error"] is None else f" <small>&plusmn; {number(it['error'])}</small>"
    equal = f" <small>and {it['infinite']} equal</small>" if it["infinite"] else ""
    return _cell(number(it["mean"]) + error + equal)


def _method(method: str) -> str:
    return _cell(escape(NAMES.get(method, method)) + (f"<br><small>{WHAT[method]}</small>" if method in WHAT else ""))


def _task(name: str, task: dict) -> str:
    measures = measures_of(task)
    rows = [("", [_method(method), *(_mean(means, m) for m in measures)]) for method, means in task["means"].items()]
    parts = [f"<h2>{TITLES[name]}: means of {task['count']}</h2>", _table(["", *_head(measures)], rows),
             "<p class='soft'>With the standard error of the mean. &uarr; higher is better, &darr; lower is "
             "better.</p>"]
    for items, words in ((task["missing"], "Measures left out for want of a file"),
                         (task["skipped"], "Pictures left out")):
        lines = [f"<b>{escape(i['measure'])}</b>: give <code>--{i['key']}</code> {escape(i['needs'])}" if "measure" in i
                 else f"<b>{escape(i['name'])}</b>: {escape(i['reason'])}" for i in items]
        if lines:
            parts.append(f"<div class='note'>{words}:<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul></div>")
    return "\n".join(parts)


def _protocol(results: dict) -> str:
    facts = dict(results["protocol"])
    for name, task in results["tasks"].items():
        facts[f"set of {name}"] = ", ".join(f"{key} {value}" for key, value in task["set"].items())
    for key, it in results["measures"].items():
        facts[f"measured by {key}"] = f"{it['kind']}, {it['file']}, sha256 {it['sha256']}"
    facts["software"] = ", ".join(f"{key} {value}" for key, value in results["software"].items())
    facts["device"] = results["device"]
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items())
    return f"<details><summary>Protocol: how this was painted and measured</summary><dl>{listed}</dl></details>"


def _published(tasks: dict) -> str:
    """Each published table with our rows above it, for the measures that both have."""
    parts = []
    for it in TABLES:
        if it.task not in tasks:
            continue
        means, shown = tasks[it.task]["means"], measures_of(tasks[it.task])
        measures = [m for m in MEASURES if m in shown and any(m in row.values for row in it.rows)]
        if not measures:
            continue
        ours = [("ours", [_method(method), *(_mean(values, m) for m in measures), _cell("this page", "text")])
                for method, values in means.items() if method not in ("vae", "unedited", "source")]
        theirs = [("", [_cell(escape(row.method)), *(_cell(number(row.values.get(m))) for m in measures),
                        _cell(escape(row.source) + (" (second hand)" if row.read == "secondary" else ""), "text")])
                  for row in it.rows]
        parts += [f"<h3>{escape(it.title)} <span class='tag'>another protocol</span></h3>",
                  f"<p class='soft'>Theirs: {escape(it.protocol)}.</p>",
                  _table(["", *_head(measures), SOURCE], ours + theirs)]
    if not parts:
        return ""
    return ("<h2 id='published'>Beside published figures</h2><p>None of these was measured as ours were: data, "
            "sizes and the encoders of the measures differ, and so do the tables among themselves. Read them as "
            "orders of magnitude.</p>"
            + "".join(parts))


def _gallery(name: str, task: dict, folder: Path) -> str:
    samples = task["samples"][:SHOWN]
    methods, measures = list(task["means"]), measures_of(task)
    keys = [(method, m) for method in methods if method != "source" for m in measures if m in task["means"][method]]
    options = "".join(f"<option value='{_key(*key)}'>{escape(MEASURES[key[1]].label)}, {escape(NAMES.get(key[0], key[0]))}</option>"
                      for key in keys)
    more = f" <small class='soft'>the first {SHOWN} of {task['count']}</small>" if task["count"] > SHOWN else ""
    cards = "\n".join(_card(place, sample, folder / sample["key"], measures) for place, sample in enumerate(samples))
    sort = f"<select aria-label='sort by'><option value=''>as they come</option>{options}</select>"
    turn = "<button type='button' aria-pressed='false'>lowest first</button>"
    find = "<input type='search' placeholder='search' aria-label='search'>"
    return (f"<section class='gallery' id='{name}-pictures'><h2>{TITLES[name]} side by side{more}</h2>"
            "<p class='soft'>Click a picture to wipe between it and the source.</p>"
            f"<div class='bar'>{sort}{turn}{find}</div><div class='cards'>{cards}</div></section>")


def _key(method: str, measure: str) -> str:
    """A name for a data attribute. JavaScript reads such names as lower-case letters and digits only."""
    return "".join(c for c in f"{method}{measure}".lower() if c.isalnum())


def _card(place: int, sample: dict, folder: Path, measures: list[str]) -> str:
    asked = sample.get("instruction", "")
    data = {_key(method, m): value for method, values in sample["values"].items() for m, value in values.items()}
    data = {"place": place, "words": f"{sample['name']} {asked}".lower()} | {k: v for k, v in data.items() if math.isfinite(v)}
    attributes = " ".join(f'data-{key}="{escape(str(value))}"' for key, value in data.items())
    title = f"<b>{escape(asked)}</b> <span class='soft'>{escape(sample['name'])}</span>" if asked else escape(sample["name"])
    order = ["source", *(["target"] if asked else []), *(m for m in sample["values"] if m != "source")]
    values = {**sample["values"], "source": {}}  # the means say enough about the source itself, which stands first
    figures = "".join(_figure(name, folder / f"{name}.png", values.get(name, {}), measures) for name in order)
    return f"<article class='card' {attributes}><h3>{title}</h3><div class='strip'>{figures}</div></article>"


def _figure(name: str, file: Path, values: dict, measures: list[str]) -> str:
    label = escape(NAMES.get(name, name))
    listed = "".join(f"<span>{escape(MEASURES[m].label)} <b>{number(values[m])}</b></span>" for m in measures
                     if m in values)
    return (f"<figure><img src='{_inline(file)}' alt='{label}'><figcaption>{label}</figcaption>"
            f"<div class='values'>{listed}</div></figure>")


def _inline(file: Path) -> str:
    """A picture as a data address: JPEG, at most SIDE px."""
    with Image.open(file) as image:
        image = image.convert("RGB")
        image.thumbnail((SIDE, SIDE))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
