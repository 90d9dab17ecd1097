"""Runs the campaign and prints its table; see the package's docstring."""
import argparse
import os
import signal
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a forked process has no threads of OpenMP

from tests.campaign import core  # noqa: E402
from tests.campaign.goals import GOALS  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("CAMPAIGN_MINUTES") or 20))
    parser.add_argument("--only", nargs="+", choices=GOALS, metavar="GOAL", help=", ".join(GOALS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trial", type=int, metavar="N", help="this one only")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="begin with this trial")
    parser.add_argument("--count", type=int, metavar="N", help="so many trials per goal")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the trials' processes are ended first
    chosen = [GOALS[name] for name in args.only or GOALS]
    if args.trial is not None:
        os.environ["CAMPAIGN_LOUD"] = "1"
    print(f"campaign: seed {args.seed}, {args.minutes:g} minutes, goals {' '.join(goal.name for goal in chosen)}",
          flush=True)
    end, reports = time.monotonic() + 60 * args.minutes, []
    with tempfile.TemporaryDirectory(prefix="campaign-", ignore_cleanup_errors=True) as root:
        for i, goal in enumerate(chosen):
            now = time.monotonic()
            share = goal.share / sum(later.share for later in chosen[i:])
            numbers = [args.trial] if args.trial is not None else \
                range(args.first, args.first + min(goal.cap, args.count or goal.cap))
            deadline = end if args.trial is not None else now + (end - now) * share
            reports.append(core.run(goal, args.seed, numbers, root, deadline, say))
            last = reports[-1]
            say(f"{goal.name}: {last.tried} tried, {last.failed} failed in {time.monotonic() - now:.0f} s")
    print(core.table(reports))
    if args.trial is not None:
        for report in reports:
            for kind, found in report.failures.items():
                print(f"\n{kind}\n{found[0][1]}")
    return int(any(report.failed for report in reports))


def say(text):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
