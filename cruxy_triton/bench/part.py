"""One part of `bench gpu` as a process of its own: `python -m cruxy_triton.bench.part TARGET DEVICE RESULT ARGUMENTS`.

TARGET is module:function, called with the device's name and the ARGUMENTS (a JSON object). The function returns what
it found as plain data; sentences under "failures" make the part a failed one. RESULT is the JSON file written.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from cruxy_triton import files


class Skip(Exception):
    """This machine lacks what a part needs; the message says what."""


def outcome(target: str, device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the part found, as {"status", "found", "failures"}; nothing that it raises gets out."""
    module, _, name = target.partition(":")
    try:
        found = dict(getattr(importlib.import_module(module), name)(device, **arguments))
    except Skip as reason:
        return {"status": "skipped", "found": {}, "failures": [str(reason)]}
    except Exception as error:
        traceback.print_exc()
        memory = type(error).__name__ == "OutOfMemoryError"
        sentence = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return {"status": "out of memory" if memory else "failed", "found": {}, "failures": [sentence]}
    failures = found.pop("failures", [])
    status = found.pop("status", "failed" if failures else "passed")
    return {"status": status, "found": found, "failures": failures}


def main(target: str, device: str, result: str, arguments: str) -> None:
    files.write_json(Path(result), outcome(target, device, json.loads(arguments)))


if __name__ == "__main__":
    from cruxy_triton.bench import part  # itself by its own name, whose Skip the parts raise

    part.main(*sys.argv[1:])
