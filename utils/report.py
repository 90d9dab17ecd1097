"""What runs have come to, in the terminal.

    python -m utils.report runs/                             # the table of all runs: utils/pictures/table.py
    python -m utils.report noise runs/seg/fold0 runs/...     # the samples with the lowest scores: utils/pictures/review.py
"""
import sys

from utils.errors import Parser, UserError, cli
from utils.files import check_absent
from utils.pictures import cells, review, table

SHOWN = 20  # samples of a ranking


def print_table(argv):
    parser = Parser(prog="python -m utils.report",
                    description="Lists the runs, the best first. `noise RUN ...` ranks samples instead.")
    parser.add_argument("folders", nargs="*", default=["runs"], metavar="DIR", help="where runs are (default: runs)")
    args = parser.parse_args(argv)
    found = table.rows(args.folders)
    if not found:
        raise UserError(f"{' '.join(args.folders)}: no runs below (results.csv); give the folder that --project names")
    print(cells.as_text(found), end="")


def rank_noise(argv):
    parser = Parser(prog="python -m utils.report noise", description="Ranks samples, the lowest score first.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, such as one per fold")
    parser.add_argument("--out", default="noise.csv", metavar="FILE", help="the ranking (default: noise.csv)")
    args = parser.parse_args(argv)
    check_absent(args.out)  # somebody may have crossed out rows in it
    ranked = review.rank_samples(args.runs)
    cells.write_csv(args.out, ranked)
    print(f"{args.out}: {len(ranked)} samples, the worst are")
    for row in ranked[:SHOWN]:
        print(f"{row['rank']:4}  {row['score']:8.4f}  {row['name']}  ({row['run']})")


def main():
    if sys.argv[1:2] == ["noise"]:
        rank_noise(sys.argv[2:])
    else:
        print_table(sys.argv[1:])


if __name__ == "__main__":
    cli(main)
