"""What runs have come to, in the terminal.

    python -m utils.report runs/                             # the table of all runs: utils/pictures/table.py
    python -m utils.report noise runs/seg/fold0 runs/...     # the samples that fit worst: utils/pictures/review.py
"""
import sys

from utils.errors import Parser, cli
from utils.files import check_absent
from utils.pictures import review, table
from utils.pictures.charts import write_csv


def main():
    noise = sys.argv[1:2] == ["noise"]
    parser = Parser(prog="python -m utils.report" + " noise" * noise, description="Samples, those that fit worst first."
                    if noise else "The runs, the best first. `noise RUN ...` ranks samples instead.")
    if noise:
        parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, such as one per fold")
        parser.add_argument("--out", default="noise.csv", metavar="FILE", help="the ranking (default: noise.csv); "
                            "pictures of the worst, with labels and predictions, beside it (noise.csv.png)")
        given = parser.parse_args(sys.argv[2:])
        page = f"{given.out}.png"
        for path in (given.out, page):
            check_absent(path)  # somebody may have crossed out rows in it
        ranked = review.rank(given.runs)
        write_csv(given.out, ranked)
        print(f"{given.out}: {len(ranked)} samples, the worst are")
        for row in ranked[:20]:
            print(f"{row['rank']:4}  {row['score']:8.4f}  {row['name']}  ({row['run']})")
        count = review.draw_noise(page, ranked[:20])
        print(f"{page}: {count} of them with labels and predictions" if count else
              "no pictures: the runs have none of them")
        return
    parser.add_argument("folders", nargs="*", default=["runs"], metavar="DIR", help="where runs are (default: runs)")
    parser.add_argument("--metric", metavar="NAME", help="the column of results.csv to sort by")
    parser.add_argument("--format", choices=("text", "csv", "markdown"), default="text")
    given = parser.parse_args(sys.argv[1:])
    print(table.render(table.tables(given.folders, given.metric), given.format), end="")


if __name__ == "__main__":
    cli(main)
