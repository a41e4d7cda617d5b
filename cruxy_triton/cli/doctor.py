"""`cruxy-triton doctor`: versions, devices, the backend and why, known problems and what to do about each."""

import argparse
import json

from cruxy_triton import doctor
from cruxy_triton.environment import quiet_libraries


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    quiet_libraries(one_gpu=False)
    findings = doctor.examine()
    print(json.dumps(findings, indent=2) if args.json else doctor.render(findings))
    return 1 if any(p["severity"] == "error" for p in findings["problems"]) else 0
