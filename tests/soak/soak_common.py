"""The loop of a soak: one seed after the other until the time is over, failures collected with their seeds."""

import argparse
import faulthandler
import re
import sys
import time
import traceback
from collections.abc import Callable

KINDS = 12  # of failures after which a soak gives up


class Fault(AssertionError):
    """What a case found wrong."""


def soak(case: Callable[[int], None], parser: argparse.ArgumentParser | None = None) -> None:
    """Runs `case(seed)` and exits with 1 where one raised anything. `--seed` runs one, with its traceback."""
    args = options(parser)
    if args.seed is not None:
        case(args.seed)
        sys.stdout.write(f"seed {args.seed}: nothing found\n")
        return
    end, seed, found = time.monotonic() + 60 * args.minutes, args.start, {}
    faulthandler.enable()
    here = open("seed.txt", "w", encoding="utf-8")  # noqa: SIM115 (for the life of the process: a crash leaves it)
    while time.monotonic() < end and len(found) < KINDS:
        here.seek(0)
        here.write(f"{seed}\n")
        here.flush()
        try:
            case(seed)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error).strip()[:600]}"
            kind = re.sub(r"[-+]?\d[\d.e+-]*|'[^']*'|\([^)]*\)", "*", text.partition("\n")[0]) + f" {where.lineno}"
            found.setdefault(kind, []).append((seed, text))
        seed += 1
    failed = sum(map(len, found.values()))
    sys.stdout.write(f"{seed - args.start} cases from seed {args.start}, {failed} failed\n")
    for cases in found.values():
        first, text = cases[0]
        sys.stdout.write(f"FAILED --seed {first} ({len(cases)} like it): {text}\n")
    sys.exit(1 if found else 0)


def options(parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="this one only")
    return parser.parse_args()
