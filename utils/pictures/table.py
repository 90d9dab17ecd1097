"""The table of runs: a row per run, made from the runs' own files whenever it is asked for.

    python -m utils.report runs/                        # all runs below, the best first; --format csv | markdown

Every training that ends also writes it into runs/summary.csv. It is always made anew: a table that is only added to
would be out of step with a run that was resumed, renamed, copied or deleted. args.json, results.csv and swa.json hold
most of a row; run.json holds what they do not tell: when the run began, the code's commit, the flags' defaults at that
time, and the name of the score.
"""
import csv
import json
import math
import os
import shlex
import sys
from pathlib import Path

from utils.errors import UserError
from utils.files import locked, writing
from utils.pictures import cells

RECORDS = ("args.json", "results.csv")  # a folder with one of them is a run
TASKS = ("seg", "det", "cls")  # projects of these names share a table
WHERE = ("project", "name", "resume")  # flags that say where a run is, not what
OLD_SCORES = ("iou", "miou", "ap", "acc")  # of the first edition's runs, whose run.json does not name the score


def flags(chosen, defaults):
    """The arguments that differ from the defaults as text, "--lr 0.01 --no-ema --loss bce=0.5": to be read, for lists
    of bands are written with spaces. Both: {flag: value} as JSON holds them."""
    def word(value):
        if isinstance(value, list):
            return "=".join(map(word, value))  # a term of --loss and its weight
        return f"{value:g}" if isinstance(value, float) else shlex.quote(str(value))

    def text(flag, value):
        flag = flag.replace("_", "-")
        if isinstance(value, bool):
            return f"--{flag}" if value else f"--no-{flag}"
        return " ".join([f"--{flag}", *map(word, value if isinstance(value, list) else [value])])

    return " ".join(text(flag, value) for flag, value in chosen.items()
                    if flag not in WHERE and value != defaults.get(flag))


def tables(folders, metric=None):
    """-> {project: rows, the best run first}; a project is a folder of runs.

    metric: the column of results.csv to sort by (the higher the better, with "loss" in its name the lower); by default
    the run's score. A run's best value is the best over its epochs, with the last or the EMA weights; `swa` is the
    value of swa.pt, by which no run is sorted. Runs with different metrics are not compared, those without any value
    come last.
    Raises UserError when there is no run. What is damaged is left out, with a line on stderr.
    """
    found = sorted({path.parent for folder in folders for name in RECORDS for path in Path(folder).rglob(name)})
    if not found:
        raise UserError(f"{' '.join(map(str, folders))}: no runs below ({', '.join(RECORDS)}); give the folder that "
                        f"--project names")
    projects = {}
    for run in found:
        projects.setdefault(run.parent, []).append(_row(run, metric))
    if metric and not any(row["metric"] for rows in projects.values() for row in rows):
        raise UserError(f"--metric {metric}: no results.csv has this column; choose one that a results.csv has")
    return {project: sorted(rows, key=_order) for project, rows in projects.items()}


def write(folder):
    """Writes summary.csv beside a run's folder, the table of all runs there; of runs/seg/exp into runs, with the runs
    of the other tasks.

    Raises UserError when it cannot be written. What is damaged is left out, with a line on stderr.
    """
    project = Path(os.path.abspath(folder)).parent  # of "." too
    parent = project.parent if project.name in TASKS else project
    places = [parent / task for task in TASKS] if project.name in TASKS else [project]
    path = parent / "summary.csv"
    # the process that writes last has read last, so it sees runs that end at the same time
    with writing(path), locked(path.with_name(".summary.lock")):
        found = tables(places)
        cells.write_csv(path, [row | {"run": os.path.relpath(row["run"], parent)}
                               for place in places for row in found.get(place, ())])


def render(projects, form="text"):
    """{project: rows} of `tables` -> text. form: "text" or "markdown", a blank line between projects; or "csv", one
    table."""
    if form == "csv":
        return cells.as_csv([row for rows in projects.values() for row in rows])
    return "\n".join(cells.as_text(rows, markdown=form == "markdown") for rows in projects.values())


def _order(row):
    best = row["best"]
    return best is None, row["metric"], best if "loss" in row["metric"] else -(best or 0), row["run"]


def _row(run, metric):
    chosen, note, averaged = (_read(run / f"{name}.json", _parse_json) or {} for name in ("args", "run", "swa"))
    results = _read(run / "results.csv", _parse_results) or [{}]
    name = metric or note.get("score") or next((name for name in results[0] if name in OLD_SCORES), None)
    name = name if name in list(results[0]) else ""
    known = [row for row in results if math.isfinite(row.get(name, math.nan))]
    best = (min if "loss" in name else max)(known, key=lambda row: row[name], default={})
    seconds = [row["seconds"] for row in results if math.isfinite(row.get("seconds", math.nan))]
    defaults = note.get("defaults")
    return {"run": str(run), "date": note.get("started", ""), "metric": name, "best": best.get(name),
            "epoch": int(best["epoch"]) if best else None,
            "last": results[-1][name] if known and known[-1] is results[-1] else None,
            "swa": averaged.get(name) if chosen.get("swa", 1) else None,  # else outdated
            "minutes": sum(seconds) / 60 if seconds else None, "commit": note.get("commit", ""),
            "flags": flags(chosen, defaults if isinstance(defaults, dict) else {})}


def _read(path, parse):
    """What `parse` makes of the text of a file; None without the file, or (said on stderr) when it is damaged."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError, csv.Error):
        print(f"warning: {path}: damaged, left out", file=sys.stderr)
        return None


def _parse_json(text):
    return json.loads(text) | {}  # TypeError where it is no dict


def _parse_results(text):
    """results.csv -> a dict of floats per epoch, NaN for an empty cell."""
    rows = [{name: float(cell or "nan") for name, cell in line.items()}  # TypeError: more cells than columns
            for line in csv.DictReader(text.splitlines(), strict=True)]
    if not all(math.isfinite(row["epoch"]) for row in rows):
        raise ValueError
    return rows
