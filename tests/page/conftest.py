"""What the tests of the page need beyond Python: Node.js, the npm packages, Chromium. Where one is absent, a skip."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = Path(os.environ.get("CRUXY_NODE_MODULES", ROOT / "node_modules"))


@pytest.fixture(scope="session")
def needs() -> Callable[..., Path]:
    """needs("pyodide", ...) -> the folder with these npm packages; skips where node or one of them is absent."""

    def get(*packages: str) -> Path:
        if shutil.which("node") is None:
            pytest.skip("node is not installed")
        if absent := " ".join(name for name in packages if not (MODULES / name).is_dir()):
            pytest.skip(f"{MODULES} lacks {absent}: npm install {absent}, or name the folder in CRUXY_NODE_MODULES")
        return MODULES

    return get


@pytest.fixture(scope="session")
def built(needs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page with Pyodide in its folder."""
    modules = needs("pyodide")
    from cruxy_triton.page.build import build

    folder = tmp_path_factory.mktemp("page") / "site"
    build(folder, modules / "pyodide")
    return folder


@pytest.fixture(scope="session")
def drive(built: Path) -> Callable[..., list[dict[str, Any]]]:
    """drive(script, value) -> the JSON lines that tests/page/<script> prints for the JSON of `value`."""

    def run(script: str, value: Any, timeout: float = 900) -> list[dict[str, Any]]:
        done = subprocess.run(
            ["node", str(Path(__file__).parent / script), str(built), str(MODULES)],
            input=json.dumps(value),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{done.stdout[-300:]}\n{done.stderr[-3000:]}"
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


# -- thirty configs and links of a stranger who wants markup, script, or a crash --------------------------------

IMAGE = "<img src=x onerror=alert(1)>"
SCRIPT = "</script><script>alert(1)</script>"
GOOD = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip

CONFIGS = [
    {**GOOD, "_name_or_path": IMAGE},
    {**GOOD, "_name_or_path": SCRIPT},
    {**GOOD, "hf_id": '"><svg onload=alert(1)>'},
    {**GOOD, "hf_id": "a/b; rm -rf ~ #"},
    {**GOOD, "model_type": IMAGE},
    {**GOOD, "model_type": "constructor"},
    {**GOOD, "hidden_act": "javascript:alert(1)"},
    {**GOOD, "hidden_size": IMAGE},
    {**GOOD, "num_hidden_layers": -1},
    {**GOOD, "vocab_size": 1e308},
    {**GOOD, "num_attention_heads": 0},
    {**GOOD, "partial_rotary_factor": float("nan")},
    {**GOOD, f"{IMAGE}_config": {"a": 1}},
    {**GOOD, "quantization_config": {"quant_method": IMAGE}},
    {**GOOD, "__proto__": {"polluted": True}, "source": SCRIPT},
    {**GOOD, "max_position_embeddings": 2**31 - 1, "hidden_size": 2**31 - 4},
]
TEXTS = [
    "[" * 100_000,
    '{"a":' * 50_000,
    "\x00\ud7ff{",
    f"[{json.dumps(IMAGE)}]",
    "<!doctype html><script>alert(1)</script>",
]
# Fragments of links, as they would be sent to somebody.
LINKS = [
    "model=<img src=x onerror=alert(1)>",
    "model=%3Cscript%3Ealert(1)%3C/script%3E&gpu=t4",
    "gpu=%22%3E%3Csvg/onload=alert(1)%3E",
    "model=../../etc/passwd",
    "model=javascript:alert(1)/x&max_seq_length=%3Cb%3E",
    "__proto__=x&constructor=y&prototype=z&innerHTML=%3Cimg%20src=x%20onerror=alert(1)%3E",
    "way=%3Cimg%20src=x%20onerror=alert(1)%3E&lora_r=99999999999999999999",
    "target_modules=%3Cimg%20src=x%20onerror=alert(1)%3E&model=tinyllama-1.1b",
    "config=%7B%22model_type%22:%22%3Cimg%20src=x%20onerror=alert(1)%3E%22%7D&config_name=%3Cimg%20src=x%20onerror=alert(1)%3E",
]


@pytest.fixture(scope="session")
def hostile() -> dict[str, list[str]]:
    """{"configs": texts of a config.json, "links": fragments}, thirty in all."""
    return {"configs": [json.dumps(config) for config in CONFIGS] + TEXTS, "links": LINKS}
