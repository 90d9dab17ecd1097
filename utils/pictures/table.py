"""The table of experiments: a row per run, made from the runs' own files whenever it is asked for.

    python -m utils.report runs/                        # all runs below, the best first; --format csv | markdown

Every training that ends also writes it into runs/summary.csv. It is made anew each time: a table that is only added to
would be out of step with a run that was resumed, renamed, copied or deleted. What a run knows already
stands in args.json, results.csv and swa.json; what it would forget (when it began, the code's commit, the defaults of
that day) `write_note` adds as run.json.
"""
import csv
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from utils.errors import UserError
from utils.files import locked, write_json, write_text, writing

COLUMNS = ("run", "date", "metric", "best", "epoch", "last", "swa", "minutes", "commit", "flags")
NUMBERS = ("best", "epoch", "last", "swa", "minutes")
RECORDS = ("args.json", "results.csv")  # a folder with one of them is a run
TASKS = ("seg", "det", "cls")  # projects of these names share a table
WHERE = ("project", "name", "resume")  # flags that say where a run is, not what


def higher_is_better(key):
    """Whether the name of a column says so: iou, ap50, map, f1, ..., but nothing with "loss" in it."""
    known = "iou|dice|f1|^ap|map|acc|prec|recall|auc|score"
    return "loss" not in key.lower() and bool(re.search(known, key.lower()))


def write_note(folder, defaults):
    """Writes run.json into the run's folder: {"started", "commit", "defaults"}. A resumed run keeps all but the commit:
    its flags are to be compared with the defaults that it began with.

    defaults: {flag: value}, such as vars(parser.parse_args([])). Raises UserError when it cannot be written.
    """
    path = Path(folder) / "run.json"
    old = _read_json(path)
    began = old.get("defaults") if isinstance(old.get("defaults"), dict) else {}
    write_json(path, old | {"started": old.get("started") or time.strftime("%Y-%m-%d %H:%M"),
                                 "commit": commit(Path(__file__).parent), "defaults": defaults | began})


def commit(folder):
    """The short hash of the git commit in `folder`, with "-dirty" behind it when files differ from it; "" without one.
    """
    git = shutil.which("git")
    if not git:
        return ""
    command = [git, "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*"]  # no tags: the hash only
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def flags(chosen, defaults):
    """The arguments that differ from the defaults as text, "--lr 0.01 --no-ema --loss bce=0.5": to be read, for lists
    of bands are written with spaces. Both: {flag: value} as JSON holds them."""
    def word(value):
        if isinstance(value, list):
            return "=".join(map(word, value))  # a term of --loss and its weight
        return f"{value:g}" if isinstance(value, float) else shlex.quote("none" if value is None else str(value))

    def text(flag, value):
        flag = flag.replace("_", "-")
        if isinstance(value, bool):
            return f"--{flag}" if value else f"--no-{flag}"
        return " ".join([f"--{flag}", *map(word, value if isinstance(value, list) else [value])])

    return " ".join(text(flag, value) for flag, value in chosen.items()
                    if flag not in WHERE and value != defaults.get(flag))


def tables(folders, metric=None):
    """-> {project: rows, the best run first}; a project is a folder of runs. A row has the COLUMNS.

    metric: the column of results.csv to sort by (the higher the better, with "loss" in its name the lower); by default
    the first one whose name says that higher is better. A run's best value is that over its epochs, of the last or EMA
    weights; `swa` is that of swa.pt, by which no run is sorted. Runs with different metrics are not compared, those
    without any value come last.
    Raises UserError when there is no run. What is damaged is left out, with a line on stderr.
    """
    found = sorted({path.parent for folder in folders for name in RECORDS for path in Path(folder).rglob(name)})
    if not found:
        raise UserError(f"{' '.join(map(str, folders))}: no runs below ({', '.join(RECORDS)}); give the folder that "
                        f"--project names")
    projects = {}
    for run in found:
        projects.setdefault(run.parent, []).append(run)
    result = {project: _rows(inside, metric) for project, inside in projects.items()}
    if metric and not any(row["metric"] for rows in result.values() for row in rows):
        raise UserError(f"--metric {metric}: no results.csv has this column; choose one of theirs")
    return result


def write(folder):
    """Writes summary.csv beside a run's folder, the table of all runs there; of runs/seg/exp into runs, with the runs
    of the other tasks.

    Raises UserError when it cannot be written. What is damaged is left out, with a line on stderr.
    """
    project = Path(os.path.abspath(folder)).parent  # of "." too
    path = (project.parent if project.name in TASKS else project) / "summary.csv"
    projects = [path.parent / task for task in TASKS] if project.name in TASKS else [project]
    # the process that writes last has read last, so it sees runs that end at the same time
    with writing(path), locked(path.with_name(".summary.lock")):
        tables = {place: _rows(sorted({file.parent for name in RECORDS for file in place.glob(f"*/{name}")}))
                  for place in projects}
        for row in (row for rows in tables.values() for row in rows):
            row["run"] = os.path.relpath(row["run"], path.parent)
        write_text(path, render(tables, "csv"))


def _rows(found, metric=None):
    """The rows of one project's runs, the best first."""
    entries = [(run, _read_json(run / "args.json"), _read_json(run / "run.json")) for run in found]
    rows = [_row(run, chosen, note, metric) for run, chosen, note in entries]
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _row(run, chosen, note, metric):
    """-> (sort key, row)"""
    results = _read_results(run / "results.csv")
    name = _metric(results, metric)
    known = [row for row in results if math.isfinite(row.get(name, math.nan))]
    lower = "loss" in (name or "")
    best = (min if lower else max)(known, key=lambda row: row[name], default=None)
    seconds = [row["seconds"] for row in results if math.isfinite(row.get("seconds", math.nan))]
    key = (best is None, name or "", best and best[name] * (1 if lower else -1), str(run))
    defaults = note.get("defaults")
    return key, {
        "run": str(run), "date": str(note.get("started") or ""), "metric": name or "",
        "best": best[name] if best else None, "epoch": int(best["epoch"]) if best else None,
        "last": known[-1][name] if known and known[-1] is results[-1] else None,
        "swa": _number(_read_json(run / "swa.json").get(name)) if chosen.get("swa", 1) else None,  # else outdated
        "minutes": sum(seconds) / 60 if seconds else None, "commit": str(note.get("commit") or ""),
        "flags": flags(chosen, defaults if isinstance(defaults, dict) else {})}


def _number(value):
    """A finite number of a JSON as it is, anything else as None."""
    return value if isinstance(value, float) and math.isfinite(value) else None


def _metric(results, wanted):
    """The name of the score's column, or None."""
    columns = list(results[0]) if results else []
    if wanted:
        return wanted if wanted in columns else None
    return next((name for name in columns if higher_is_better(name)), None)


def _read_json(path):
    """The dict in a file; {} when there is no file, or (said on stderr) when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        pass
    print(f"warning: {path}: damaged, left out", file=sys.stderr)
    return {}


def _read_results(path):
    """results.csv -> a dict of floats per epoch (NaN for an empty cell); [] as above."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file, strict=True))
        rows = [{name: float(cell or "nan") for name, cell in line.items()} for line in lines]
        if all(math.isfinite(row["epoch"]) for row in rows):
            return rows
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, csv.Error):  # TypeError: more cells than columns
        pass
    print(f"warning: {path}: damaged, left out", file=sys.stderr)
    return []


def render(projects, form="text"):
    """{project: rows} of `tables` -> text. form: "text", aligned, a blank line between projects; "csv", one table with
    six digits; "markdown"."""
    if form == "csv":
        file = io.StringIO()
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for row in (row for rows in projects.values() for row in rows):
            table.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in (row[c] for c in COLUMNS)])
        return file.getvalue()
    return "\n".join(_aligned([_cells(row) for row in rows], form == "markdown") for rows in projects.values())


def _cells(row):
    digits = {"best": ".4f", "last": ".4f", "swa": ".4f", "minutes": ".1f", "epoch": "d"}
    texts = ["" if row[c] is None else format(row[c], digits.get(c, "")) for c in COLUMNS]
    return [" ".join(text.split()) for text in texts]  # a flag's text may have several lines


def _aligned(rows, markdown):
    rows = [list(COLUMNS), *rows]
    if markdown:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        rows.insert(1, ["--:" if c in NUMBERS else "---" for c in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[cell.rjust(w) if c in NUMBERS else cell.ljust(w) for c, cell, w in zip(COLUMNS, row, widths)]
             for row in rows]
    joined = ["| " + " | ".join(line) + " |" if markdown else "  ".join(line).rstrip() for line in lines]
    return "\n".join(joined) + "\n"
