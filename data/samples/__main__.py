"""Small synthetic data sets in the layouts of the competitions, so that every command runs as it stands.

    python -m data.samples            # Wildfire/, DATA/ and resources/ in the working directory, 48 + 12 pictures each
    python -m data.samples --only parking --out /tmp/demo --train 200 --test 50

They are made to exercise the code and to be learnable, not to be realistic: a score on them says nothing about a
competition. Picture i of a split depends on (seed, split, i) and the size alone.
"""
import argparse
import os

from data.samples.letters import letters
from data.samples.parking import parking
from data.samples.wildfire import wildfire
from utils.train.args import int_range
from utils.errors import Parser, cli
from utils.files import check_absent


def main():
    folders = {"letters": "resources", "wildfire": "Wildfire", "parking": "DATA"}
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=folders, help="write this one alone (default: all)")
    parser.add_argument("--out", default=".", metavar="DIR", help="where the folders go (default: here)")
    parser.add_argument("--train", type=int_range(1), default=48, metavar="N", help="training pictures each (default: 48)")
    parser.add_argument("--test", type=int_range(0), default=12, metavar="N", help="test pictures each (default: 12)")
    parser.add_argument("--size", type=int_range(64), default=256, metavar="N", help="side of a tile (default: 256)")
    parser.add_argument("--seed", type=int_range(0), default=0, metavar="N", help="other seed, other pictures (default: 0)")
    args = parser.parse_args()
    wanted = [args.only] if args.only else list(folders)
    for task in wanted:                                   # before minutes are spent on the others
        check_absent(os.path.join(args.out, folders[task]))
    counts = dict(train=args.train, test=args.test, seed=args.seed)
    if "letters" in wanted:
        print(letters(args.out, **counts))
    if "wildfire" in wanted:
        print(wildfire(args.out, size=args.size, **counts))
    if "parking" in wanted:
        print(parking(args.out, **counts))


if __name__ == "__main__":
    cli(main)
