"""The table of runs: a row per run, made from the runs' own files whenever it is asked for.

    python -m utils.report runs/                        # all runs below, project by project, the best first

Every training that ends also writes it into runs/summary.csv. It is always made anew: a table that is only added to
would be out of step with a run that was resumed, renamed, copied or deleted.
"""
import math
import os
import sys
from pathlib import Path

from utils.files import locked, read_csv, read_json, writing
from utils.pictures import cells

TASKS = ("seg", "det", "cls")  # projects of these names share a table


def rows(folders, pattern="**/results.csv"):
    """The runs in these folders -> [{column: value}], project by project, the best score first; a project is a folder
    of runs. pattern: the glob pattern of results.csv below a folder.

    "best" is the best score over a run's epochs, with the last or the EMA weights. Runs with different scores are not
    compared, those without any come last. What is damaged is left out, with a line on stderr.
    """
    found = []
    for file in sorted({file for folder in folders for file in Path(folder).glob(pattern)}):
        try:
            found.append(_row(file.parent))
        except Exception as error:  # whatever is wrong with a run, it must not hurt its neighbours
            print(f"warning: {file.parent}: damaged, left out ({error})", file=sys.stderr)
    return sorted(found, key=lambda row: (os.path.dirname(row["run"]), row["best"] is None, row["metric"],
                                          -(row["best"] or 0), row["run"]))


def write(folder):
    """Writes summary.csv beside a run's folder, the table of all runs there; of runs/seg/exp into runs, with the runs
    of the other tasks and projects.

    Raises UserError when it cannot be written. What is damaged is left out, with a line on stderr.
    """
    project = Path(os.path.abspath(folder)).parent  # of "." too
    parent, depth = (project.parent, "*/*") if project.name in TASKS else (project, "*")
    path = parent / "summary.csv"
    # the process that writes last has read last, so it sees runs that end at the same time
    with writing(path), locked(path.with_name(".summary.lock")):
        cells.write_csv(path, [row | {"run": os.path.relpath(row["run"], parent)}
                               for row in rows([parent], f"{depth}/results.csv")])


def _row(run):
    """The row of one run. Raises one of many errors where a file is damaged."""
    record = read_json(run / "run.json")
    header, *lines = read_csv(run / "results.csv")
    epochs = [dict(zip(header, line)) for line in lines]
    metric = record.get("score", "")
    scores = [(float(epoch.get(metric) or "nan"), int(epoch["epoch"])) for epoch in epochs]
    best, number = max((pair for pair in scores if math.isfinite(pair[0])), key=lambda pair: pair[0],
                       default=(None, None))
    return {"run": str(run), "date": record["started"], "metric": metric, "best": best, "epoch": number,
            "minutes": sum(float(epoch.get("seconds") or 0) for epoch in epochs) / 60, "commit": record["commit"],
            "flags": record.get("command")}
