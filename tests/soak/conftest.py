"""The soak is collected only where it is asked for: `pytest -m soak`."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if "soak" not in (config.option.markexpr or "") else None
