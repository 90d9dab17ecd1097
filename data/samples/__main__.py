"""Small synthetic data sets in the layouts of the competitions, so that every command runs without a download.

    python -m data.samples            # Wildfire/, DATA/ and resources/ in the working directory, 48 + 12 pictures each
    python -m data.samples --only parking --out /tmp/demo --train 200 --test 50

They exercise the code and can be learned, but they are not realistic: a score on them says nothing about a competition.
Picture i of a split depends on (seed, split, i) and on the size alone.
"""
import argparse
import os

from data.samples.letters import letters
from data.samples.parking import parking
from data.samples.wildfire import wildfire
from utils.errors import Parser, cli
from utils.files import check_absent
from utils.train.args import int_range


def main():
    makers = {"letters": (letters, "resources"), "wildfire": (wildfire, "Wildfire"), "parking": (parking, "DATA")}
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", choices=makers, help="write only this data set (default: all)")
    add("--out", default=".", metavar="DIR", help="parent of the new folders (default: the working directory)")
    add("--train", type=int_range(1), default=48, metavar="N", help="training pictures in each data set (default: 48)")
    add("--test", type=int_range(0), default=12, metavar="N", help="test pictures in each data set (default: 12)")
    add("--size", type=int_range(64), default=256, metavar="N", help="side of a wildfire tile in pixels (default: 256)")
    add("--seed", type=int_range(0), default=0, metavar="N", help="another seed gives other pictures (default: 0)")
    args = parser.parse_args()
    wanted = [args.only] if args.only else list(makers)
    for name in wanted:                                   # before minutes are spent on the others
        check_absent(os.path.join(args.out, makers[name][1]))
    for name in wanted:
        size = {"size": args.size} if name == "wildfire" else {}
        print(makers[name][0](args.out, train=args.train, test=args.test, seed=args.seed, **size))


if __name__ == "__main__":
    cli(main)
