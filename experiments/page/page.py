"""One page of one run, or of several beside each other: HTML that needs no other file, no network and no script."""

import html
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

import fedjax_clip as fc
from experiments.page import panels, results, svg
from experiments.page.results import Run
from fedjax_clip.core import files
from fedjax_clip.core.types import InvalidInput

MARK = "<!doctype html><!-- a page of fedjax_clip -->"
MOST_ROWS = 100  # of the table of evaluations
MOST_CLIENTS = 50  # of the table of clients
KEYS = "client", "examples"  # of clients.npz, besides scores


def write(path: pathlib.Path, directories: Sequence[pathlib.Path]) -> None:
    """Writes the page of these run directories; a file that is no such page is not overwritten.

    Raises:
      InvalidInput: what ``results.load`` raises; a path that cannot be written, or that holds something else.
    """
    with np.errstate(invalid="ignore"):  # a mean of losses that are infinite is shown as no number
        text = build(results.load(directories))
    try:
        if path.exists() and not _is_page(path):
            raise InvalidInput(f"--out: {path} is no page of a run, so it is not overwritten; name another file.")
        files.write(path, text.encode("utf-8", "backslashreplace").decode())  # a name that is not UTF-8 is shown so
    except OSError as error:
        raise InvalidInput(f"--out: {path} cannot be written: {error.strerror}.") from None


def _is_page(path: pathlib.Path) -> bool:
    with files.regular(path).open("rb") as file:
        return file.read(len(MARK)) == MARK.encode()


def build(runs: Sequence[Run]) -> str:
    """The page of one run, or of several compared, as text."""
    several = len(runs) > 1
    told = [results.value(runs[0].config.get(key)) for key in ("task", "algorithm")]
    title = f"{len(runs)} runs compared" if several else "  ·  ".join(told)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        *(_several(runs) if several else _one(runs[0])),
        _section(
            "Curves",
            f"Held-out examples are of clients that train; held-out clients never do.{panels.meanings(runs)}",
            panels.curves(runs),
        ),
        _section(
            "Clients",
            "Every client by itself at the end, from the one served worst to the best; shaded: the worst tenth.",
            panels.clients(runs),
            _served(runs) + _each(runs),
        ),
        *(_samples(run) for run in runs if not several),
        _section("Clipping", "", panels.clipping(runs)),
        _section("Privacy", "", (), _privacy(runs)),
        _section(
            "Communication and time",
            "Bytes are those of the arrays that are sent, of all clients together.",
            panels.cost(runs),
            _cost(runs),
        ),
        _section("What ran", "", (), _settings(runs)),
        *(_evaluations(run) for run in runs if not several),
        f"<footer>fedjax_clip {fc.__version__}: <code>python -m experiments.report RUN_DIRECTORY ...</code></footer>",
    ]
    css = pathlib.Path(__file__).with_name("page.css").read_text()
    return (
        f'{MARK}\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>\n{css}</style></head>\n<body>\n'
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _one(run: Run) -> Iterator[str]:
    client, about = (html.escape(str(x)) for x in (run.config.get("client", ""), run.record.get("about", "")))
    yield f"<p><code>{client}</code></p><p>{about}</p>"
    if seams := run.seams:
        told = html.escape(". ".join(note for _, note in seams))
        yield f"<p>{told}. A dashed line marks the place in the curves.</p>"
    tiles = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in _outcome(run).items())
    yield f'<dl class="tiles">{tiles}</dl>'


def _several(runs: Sequence[Run]) -> Iterator[str]:
    outcomes = [_outcome(run) for run in runs]
    columns = list(dict.fromkeys(key for outcome in outcomes for key in outcome))
    yield _table(
        ["run", *columns], [[run.name, *(o.get(c, "–") for c in columns)] for run, o in zip(runs, outcomes)], keys=True
    )


def _outcome(run: Run) -> dict[str, str]:
    """The summary: the last evaluation, the clients served worst, and the cost."""
    facts = {}
    found = panels.evaluated([run])
    for metric, sets in found.items():
        if results.compared(metric, found)[1] and metric != run.metric[1]:
            continue  # it is in the table of the clients
        for name in sets:
            of = panels.SETS.get(name, name)
            facts[f"{metric}, {of}"] = svg.number(run.series(f"eval/{name}/{metric}")[1][-1])
            if metric and metric == run.primary(name):
                tenth = f"worst tenth of {of}" if name == "clients" else f"{of} of the worst tenth of clients"
                scores = run.clients[f"{name}/{metric}"][run.served(name, metric)]
                facts[f"{metric}, {tenth}"] = svg.number(results.worst_tenth(scores, metric))
    if best := run.record.get("best"):
        facts[f"best {best['metric']}, round {best['round']}"] = svg.number(best["value"])
    facts["rounds"] = f"{run.rows[-1]['round']:.0f}"
    if dropped := run.cumulative("dropped")[-1]:
        facts["updates dropped"] = f"{dropped:.0f}"
    if "seconds" in run.rows[-1]:
        facts["training time"] = _duration(run.cumulative("seconds")[-1])
    if "simulated_seconds" in run.rows[-1]:
        facts["simulated time"] = _duration(run.rows[-1]["simulated_seconds"])
    if sent := run.cumulative("bytes_down", "bytes_up")[-1]:
        facts["sent, both ways"] = _bytes(sent)
    return facts


def _served(runs: Sequence[Run]) -> str:
    """How the clients of each set are served: mean, median, worst tenth, worst and best client."""
    rows, keyed = [], len(runs) > 1
    for run in runs:
        for name in dict.fromkeys(key.split("/")[0] for key in run.clients):
            if not (metric := run.primary(name)):
                continue
            order, everyone = run.served(name, metric), len(run.clients[f"{name}/client"])
            values, names = (run.clients[f"{name}/{key}"][order] for key in (metric, "client"))
            ends = [f"{svg.number(values[i])} ({names[i]})" for i in (0, -1)]
            middle = [values.mean(), np.median(values), results.worst_tenth(values, metric)]
            count = f"{len(values)}" + f" of {everyone}" * (len(values) < everyone)
            cells = [panels.SETS.get(name, name), metric, count, *map(svg.number, middle), *ends]
            rows.append([run.name, *cells] if keyed else cells)
    head = ["set", "metric", "clients", "mean over clients", "median", "worst tenth", "worst client", "best client"]
    return _table(["run", *head] if keyed else head, rows)


def _each(runs: Sequence[Run]) -> str:
    """Every client of each set, worst served first: all its scores, or one score in each of several runs."""
    tables = []
    for name in dict.fromkeys(key.split("/")[0] for run in runs for key in run.clients):
        having = [run for run in runs if run.primary(name)]
        first, metric = having[0], having[0].primary(name)
        names, sizes = (first.clients[f"{name}/{key}"] for key in ("client", "examples"))
        if len(runs) == 1:
            found = [key.removeprefix(f"{name}/") for key in first.clients if key.startswith(f"{name}/")]
            scores = [s for s in dict.fromkeys((metric, *results.PRIMARY, *found)) if s in found and s not in KEYS]
            columns = {score: dict(zip(names, first.clients[f"{name}/{score}"])) for score in scores}
        else:
            of = [run for run in having if f"{name}/{metric}" in run.clients]
            columns = {r.name: dict(zip(r.clients[f"{name}/client"], r.clients[f"{name}/{metric}"])) for r in of}
        scored = first.served(name, metric)
        order = [*scored, *np.setdiff1d(np.arange(len(names)), scored)]  # at the end those without a score
        rows = [
            [str(names[c]), str(sizes[c]), *(_score(scores.get(names[c], np.nan)) for scores in columns.values())]
            for c in order[:MOST_CLIENTS]
        ]
        more = f", the worst {MOST_CLIENTS} of {len(order)}" if len(order) > MOST_CLIENTS else ""
        title = html.escape(f"Each client of {panels.SETS.get(name, name)} by {metric}{more}")
        table = _table(["client", "examples", *columns], rows)
        tables.append(f"<details open><summary>{title}</summary>{table}</details>")
    return "".join(tables)


def _score(value: float) -> str:
    """A client's score; a dash if it has none."""
    return "–" if np.isnan(value) else svg.number(value)


def _cost(runs: Sequence[Run]) -> str:
    head = [
        "clients asked",
        "down, a client and round",
        "up, a client and round",
        "down in all",
        "up in all",
        "training time",
        "a round",
    ]
    rows = []
    for run in (run for run in runs if "seconds" in run.rows[-1]):  # otherwise withheld
        asked = run.cumulative("clients", "dropped")[-1]
        down, up = (run.cumulative(key)[-1] for key in ("bytes_down", "bytes_up"))
        seconds = run.cumulative("seconds")[-1]
        each = [_bytes(x / asked) if asked and x else "–" for x in (down, up)]
        median = np.median([row.get("seconds", np.nan) for row in run.rows])
        rows.append([run.name, f"{asked:.0f}", *each, *map(_bytes, (down, up)), _duration(seconds), _duration(median)])
    return _table(["run", *head], rows) if len(runs) > 1 else _table(head, [row[1:] for row in rows])


def _privacy(runs: Sequence[Run]) -> str:
    """The privacy statement of the runs."""
    private = [(run.name, run.private) for run in runs if run.private]
    names = list(dict.fromkeys(name for _, lines in private for name in lines))
    rows = [[name, *(lines.get(name, "–") for _, lines in private)] for name in names]
    return _table(["", *(name for name, _ in private)] if len(runs) > 1 else ["", "this run"], rows)


def _samples(run: Run) -> str:
    """What the model answered to held-out prompts, before training and after it."""
    pairs = zip(run.samples.get("before", ()), run.samples.get("after", ()), strict=True)
    rows = [[old["prompt"], old["answer"], old["generated"], new["generated"]] for old, new in pairs]
    text = "The likeliest tokens, one by one, after prompts of held-out clients."
    return _section("Samples", text, (), _table(["prompt", "true answer", "before training", "after it"], rows))


def _settings(runs: Sequence[Run]) -> str:
    """The runs' settings, differences first; versions and devices."""
    records = [
        {f"--{k}": results.value(v) for k, v in run.config.items()}
        | {k: str(v) for k, v in run.record.get("versions", {}).items()}
        | {"devices": ", ".join(map(str, run.record.get("devices", ())))}
        for run in runs
    ]
    keys = list(dict.fromkeys(key for record in records for key in record))
    rows = [[key, *(record.get(key, "–") for record in records)] for key in keys]
    if len(runs) == 1:
        return _table(["setting", "value"], rows, code=True)
    different = [row for row in rows if len(set(row[1:])) > 1]
    same = [row[:2] for row in rows if len(set(row[1:])) == 1]
    tables = [_table(["differs", *(run.name for run in runs)], different, code=True)] if different else []
    return "".join([*tables, _table(["the same in all", "value"], same, code=True)])


def _evaluations(run: Run) -> str:
    """The numbers behind the curves, folded away."""
    keys = list(dict.fromkeys(key for row in run.rows for key in row if key.startswith("eval/")))
    rows = [row for row in run.rows if any(key in row for key in keys)]
    rows = rows[:: -(-len(rows) // MOST_ROWS)] if rows else []
    cells = [[f"{row['round']:.0f}", *(svg.number(row.get(key, np.nan)) for key in keys)] for row in rows]
    table = _table(["round", *(key.removeprefix("eval/") for key in keys)], cells)
    return table and f"<details><summary>Evaluations as numbers</summary>{table}</details>"


def _section(title: str, text: str, charts: Iterable[str], table: str = "") -> str:
    drawn = "".join(chart for chart in charts if chart)
    if not drawn and not table:
        return ""
    parts = [
        f"<h2>{title}</h2>",
        f"<p>{text}</p>" if text else "",
        f'<div class="charts">{drawn}</div>' if drawn else "",
    ]
    return "".join([*parts, table])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], keys: bool = False, code: bool = False) -> str:
    """A table; numbers to the right. ``keys`` puts the colour of its run before each row."""
    if not rows:
        return ""
    right = [not code and all(_is_number(row[i]) for row in rows) for i in range(len(head))]
    classes = [' class="n"' if r else "" for r in right]
    cells = [
        [f"<code>{html.escape(x)}</code>" if code and i else html.escape(x) for i, x in enumerate(row)] for row in rows
    ]
    if keys:
        for number, row in enumerate(cells):
            row[0] = svg.key(panels.style(number)) + row[0]
    lines = ["".join(f"<td{c}>{x}</td>" for c, x in zip(classes, row)) for row in cells]
    header = "".join(f"<th{c}>{html.escape(x)}</th>" for c, x in zip(classes, head))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def _is_number(text: str) -> bool:
    return text in ("–", "nan") or text[:1].isdigit() or text[:2].lstrip("-")[:1].isdigit()


def _bytes(count: float) -> str:
    size, unit = svg.byte_unit(count)
    return f"{svg.number(count / size)} {unit}"


def _duration(seconds: float) -> str:
    size, unit = svg.time_unit(seconds)
    return f"{svg.number(seconds / size)} {unit}" if seconds >= 1 else f"{svg.number(1000 * seconds)} ms"
