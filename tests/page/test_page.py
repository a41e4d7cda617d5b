"""The page's folder, form, answers and pictures, as far as Python makes them."""

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cruxy_triton import cli, settings
from cruxy_triton.errors import UserError
from cruxy_triton.page import answer, build, form
from cruxy_triton.planner import load_card, load_model, plan
from cruxy_triton.planner.markup import Markup, tag
from cruxy_triton.planner.picture import standalone
from cruxy_triton.planner.search import step_of
from cruxy_triton.planner.timeline import REGIONS, timeline

ROOT = Path(__file__).resolve().parents[2]


ACTIVE = ("script", "img", "iframe", "object", "embed", "a", "base", "form")
LOADING = ("src", "href", "style")


class Read(HTMLParser):
    """The elements of a text, and what of it could run or load something."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]

    def active(self) -> list[str]:
        found = [
            name for name, _ in self.tags if name in ("script", "img", "iframe", "object", "embed", "a", "base", "form")
        ]
        return found + [
            key for _, given in self.tags for key in given if key.startswith("on") or key in ("src", "href", "style")
        ]


def ask(**request: str) -> dict:
    return json.loads(answer.Planner().answer(json.dumps(request)))


# -- the folder -------------------------------------------------------------------------------------------------


def test_the_folder_loads_nothing_but_what_it_names(tmp_path: Path) -> None:
    written = build.build(tmp_path / "site")
    assert {"index.html", "page.json", "app.js", "worker.js", "sw.js"} <= set(written)
    assert sum(written.values()) < 400_000
    manifest = json.loads((tmp_path / "site" / "page.json").read_text())
    for file in manifest["pyodide"]:
        assert file["url"] == f"https://cdn.jsdelivr.net/npm/pyodide@{build.PYODIDE}/{file['name']}"
    packed = (tmp_path / "site" / manifest["archive"]["url"]).read_bytes()
    assert manifest["archive"]["integrity"] == "sha384-" + base64.b64encode(hashlib.sha384(packed).digest()).decode()
    assert manifest["archive"]["size"] == len(packed)
    assert all((tmp_path / "site" / name).is_file() for name in manifest["site"])
    page = Read((tmp_path / "site" / "index.html").read_text())
    assert [script.get("src") for script in page.named("script")] == ["app.js", "chart.js"]
    assert not [key for _, given in page.tags for key in given if key.startswith("on") or key == "style"]
    hosts = set()
    for path in (tmp_path / "site").iterdir():
        if path.suffix in (".js", ".json", ".html", ".css"):
            hosts |= set(re.findall(r"https?://([\w.*-]+)", path.read_text()))
    assert hosts == {"cdn.jsdelivr.net", "huggingface.co", "*.huggingface.co", "*.hf.co"}


def test_the_archive_is_the_package_and_runs_without_the_rest(tmp_path: Path) -> None:
    packed = build.archive()
    assert packed == build.archive()
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        for name in archive.namelist():
            there = ROOT / name.replace("cruxy_triton/profiles", "profiles")
            assert archive.read(name) == there.read_bytes(), name
        archive.extractall(tmp_path)
    code = f"""
import json, sys
sys.path.insert(0, {str(tmp_path)!r})
sys.modules |= dict.fromkeys(("torch", "numpy", "transformers", "triton"))
from cruxy_triton.page.answer import Planner
planner = Planner()
found = json.loads(planner.answer(json.dumps({{"model": "smollm2-135m", "gpu": "t4"}})))
print(found["plan"]["peak_bytes"], "<svg" in planner.picture(400))
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == [str(plan("smollm2-135m", "t4").peak_bytes), "True"], done.stderr


def test_folders_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("not ours")
    other = tmp_path / "pyodide"
    other.mkdir()
    for words, said in [
        (["--out", str(full)], "there is something else"),
        (["--out", str(full / "thesis.txt")], "there is something else"),
        (["--out", str(tmp_path / "no" / "where")], "does not exist"),
        (["--out", str(tmp_path / "new"), "--pyodide", str(other)], "npm install pyodide@"),
        (["--out", str(tmp_path / "new"), "--port", "99999"], "--port is 99999"),
        ([], "where to?"),
    ]:
        assert cli.main(["page", *words]) == 2
        assert said in capsys.readouterr().err
    (other / "pyodide.mjs").write_text("something else")
    assert cli.main(["page", "--out", str(tmp_path / "new"), "--pyodide", str(other)]) == 2
    assert "is not the file of that version" in capsys.readouterr().err
    assert (full / "thesis.txt").read_text() == "not ours"
    assert not (tmp_path / "new").exists()
    for _ in range(2):  # the second time over an older page
        assert cli.main(["page", "--out", str(tmp_path / "new")]) == 0
        (tmp_path / "new" / "planner-0.zip").write_text("of an older page")
    cli.main(["page", "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new" / "planner-0.zip").exists()


def test_serve_is_on_the_loopback_address(command, tmp_path: Path) -> None:
    process = command.start("page", "--out", "site", "--serve")
    try:
        address = next(m[1] for line in process.stdout if (m := re.search(r"(http://127\.0\.0\.1:\d+/)", line)))
        with urllib.request.urlopen(address, timeout=20) as page:
            assert b"Will it fit?" in page.read()
        with urllib.request.urlopen(address + "worker.js", timeout=20) as script:
            assert script.headers["Content-Type"] == "text/javascript"
    finally:
        process.terminate()
        process.wait(20)


# -- the form ---------------------------------------------------------------------------------------------------


def test_every_setting_of_plan_is_in_the_form_once() -> None:
    page = Read(form.form())
    controls = [given for kind in ("input", "select") for given in page.named(kind) if given.get("name")]
    names = [given["name"] for given in controls]
    expected = {setting.name for setting in settings.of_command("plan")} - {"method", "load_in_4bit"}
    assert sorted(names) == sorted({*expected, "way", "config", "config_name"})
    labelled = {given.get("for") for given in page.named("label")}
    assert {given["id"] for given in controls if given.get("type") != "hidden"} <= labelled
    for setting in settings.of_command("plan"):
        if setting.name in names and setting.name not in ("gpu", "model"):
            assert setting.explained("plan").replace("`", "") in page.text


@pytest.mark.parametrize("name", [setting.name for setting in settings.of_command("plan") if setting.choices])
def test_choices_are_those_of_the_setting(name: str) -> None:
    if name == "method":
        assert {pins["method"] for _, pins in form.WAYS.values()} == set(settings.SETTINGS["method"].choices)
        return
    text = str(form.form())
    select = re.search(rf'<select id="{name}".*?</select>', text)
    assert select
    values = {given["value"] for given in Read(select[0]).named("option")} - {""}
    assert values == set(map(str, settings.SETTINGS[name].choices))


# -- answers ----------------------------------------------------------------------------------------------------

# (request, model, card, settings of plan()) that must be the same plan
SAME = [
    (
        {"model": "tinyllama-1.1b", "gpu": "gtx1650-gddr5", "os": "windows"},
        ("tinyllama-1.1b", "gtx1650-gddr5"),
        {"os": "windows"},
    ),
    ({"model": "Qwen/Qwen2.5-1.5B", "vram_bytes": "6GiB", "capability": "8.6"}, ("qwen2.5-1.5b", None), {}),
    (
        {"model": "phi-2", "gpu": "t4", "way": "qlora", "lora_r": "4", "target_modules": "q_proj, v_proj",
         "double_quant": "off"},
        ("phi-2", "t4"),
        {"load_in_4bit": True, "lora_r": 4, "target_modules": ["q_proj", "v_proj"], "double_quant": False},
    ),
    ({"model": "smollm2-135m", "gpu": "rtx3070", "way": "full"}, ("smollm2-135m", "rtx3070"), {"method": "full"}),
    ({"model": "smollm2-360m", "gpu": "t4", "way": "lora-16"}, ("smollm2-360m", "t4"), {"load_in_4bit": False}),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "names", "given"), SAME)
def test_the_answer_is_the_plan(request_: dict, names: tuple, given: dict) -> None:
    from cruxy_triton.planner import Card

    model, gpu = names
    expected = plan(model, load_card(gpu) if gpu else Card.budget("6GiB", (8, 6)), **given)
    found = ask(**request_)
    assert found["plan"] == expected.to_dict()
    assert Read(found["verdict"]).text.startswith("Fits" if expected.fits else "Does not fit")
    assert f"{expected.peak_bytes / 2**30:.2f}" in found["verdict"]
    assert not Read(found["detail"]).active()


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"model": "tinylama"}, "model"),
        ({"max_seq_length": "7"}, "max_seq_length"),
        ({"max_seq_length": "9999"}, "max_seq_length"),
        ({"lora_r": "many"}, "lora_r"),
        ({"gpu": "", "vram_bytes": "4"}, "vram_bytes"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"batch_size": "6", "micro_batch_size": "4"}, "batch_size"),
        ({"target_modules": "lm_head"}, "target_modules"),
        ({"attention": "flash"}, "attention"),
    ],
)
def test_refusals_are_those_of_the_command_line_at_their_field(given: dict, field: str, capsys) -> None:
    request = {"model": "phi-2", "gpu": "t4", **given}
    words = [request["model"]]
    for name, value in request.items():
        if name != "model" and value:
            words += [settings.SETTINGS[name].flag, value]
    assert cli.main(["plan", *words]) == 2
    said = capsys.readouterr().err.removeprefix("cruxy-triton plan: error: ").strip()
    found = ask(**request)
    assert (found["error"], found["field"]) == (said, field)


def test_configs_from_the_hub_and_from_a_file() -> None:
    assert ask(model="a/b", gpu="t4") == {"fetch": "a/b"}
    config = dict(load_profile("smollm2-135m"))
    found = ask(model="a/b", gpu="t4", config=json.dumps(config))
    assert (found["plan"]["model"], found["plan"]["hf_id"]) == ("a/b", "a/b")
    found = ask(model="config.json", gpu="t4", config=json.dumps(config), config_name="config.json")
    assert found["plan"]["peak_bytes"] == plan("smollm2-135m", "t4").peak_bytes
    for status, said in [("404", "no such model"), ("401", "asks for a login"), ("the wire is cut", "wire is cut")]:
        refused = ask(model="a/b", gpu="t4", config_status=status)
        assert refused["field"] == "model"
        assert said in refused["error"]
    assert "characters" in ask(model="x", gpu="t4", config="x" * (1 << 21))["error"]
    nested = ask(model="x", gpu="t4", config='{"a":' * 200 + "1" + "}" * 200)
    assert "nested more than 100 levels deep" in nested["error"]
    assert ask(model="phi-2")["field"] == "vram_bytes"
    assert "unknown GPU" in ask(model="phi-2", gpu="auto")["error"]


def load_profile(name: str) -> dict:
    from cruxy_triton.planner.lookup import profiles

    return {key: value for key, value in profiles("models")[name].items() if key != "hf_id"}


def test_what_strangers_send_stays_text(hostile: dict[str, list[str]]) -> None:
    requests = [
        {"gpu": "t4", "model": "x", "config": text, "config_name": "<b onclick=x>"} for text in hostile["configs"]
    ]
    for link in hostile["links"]:
        requests.append({"gpu": "t4", **dict(urllib.parse.parse_qsl(link))})
    assert len(requests) == 30
    for request in requests:
        planner = answer.Planner()
        found = json.loads(planner.answer(json.dumps(request)))
        assert found.keys() & {"error", "plan", "fetch"}
        for part in (found.get("verdict", ""), found.get("detail", ""), planner.picture(400)):
            assert not Read(part).active()


def test_markup_escapes_everything_but_itself() -> None:
    assert tag("p", "<b>", tag("i", '"&'), title='"><script>') == (
        '<p title="&quot;&gt;&lt;script&gt;">&lt;b&gt;<i>&quot;&amp;</i></p>'
    )
    assert tag("input", hidden=True, value=None, data_left=3) == '<input hidden data-left="3">'
    assert tag("p", Markup("<b></b>")) == "<p><b></b></p>"


# -- memory over a step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "card", "given"),
    [
        ("tinyllama-1.1b", "gtx1650-gddr5", {}),
        ("phi-2", "t4", {"load_in_4bit": True}),
        ("gemma-2b", "rtx3090", {"method": "full"}),
        ("qwen2.5-0.5b", "rtx4090", {"chunked_loss": False}),
    ],
)
def test_the_chart_is_the_plan_over_time(model: str, card: str, given: dict) -> None:
    found = plan(model, card, alternatives=False, **given)
    moments = timeline(step_of(load_model(model), load_card(card), found.config))
    assert [name for name in REGIONS if any(m.region == name for m in moments)] == list(REGIONS)
    highest = max(moments, key=lambda moment: moment.allocated)
    assert highest.allocated == max(found.phases.values())
    parts = {name: size for name, size in found.components.items() if name not in ("context", "allocator")}
    assert highest.parts == parts
    peaks = {name: max(m.allocated for m in moments if m.region == name) for name in REGIONS}
    for name in ("forward", "loss", "optimizer"):
        # the plan books a batch's token ids in the phase before they are used
        assert peaks[name] == pytest.approx(found.phases[name], abs=2**20)
    backward = [m.phase for m in moments if m.phase.startswith("backward:layer")]
    layers = load_model(model).num_hidden_layers
    assert list(dict.fromkeys(backward)) == [f"backward:layer{n}" for n in reversed(range(layers))]


def test_the_picture_is_well_formed_and_true_to_scale() -> None:
    found = plan("tinyllama-1.1b", "gtx1650-gddr5")
    moments = timeline(step_of(load_model("tinyllama-1.1b"), load_card("gtx1650-gddr5"), found.config))
    svg = standalone(found, moments, {"measured": found.peak_bytes - 100 * 2**20})
    root = ElementTree.fromstring(svg)
    space = {"s": "http://www.w3.org/2000/svg"}
    across = {line.get("class"): float(line.get("y1")) for line in root.iterfind("s:line", space) if line.get("y1")}
    ticks = {
        float(t.text): float(t.get("y")) - 4 for t in root.iterfind("s:text", space) if t.text and t.text[0].isdigit()
    }
    per_gib = (ticks[0] - ticks[max(ticks)]) / max(ticks)
    for name, size in [
        ("usable", found.usable_bytes),
        ("peak", found.peak_bytes),
        ("measured", found.peak_bytes - 100 * 2**20),
    ]:
        assert (ticks[0] - across[name]) / per_gib == pytest.approx(size / 2**30, abs=0.02)
    tops = [float(y) for path in root.iterfind("s:path", space) for y in re.findall(r"V([\d.]+)", path.get("d"))]
    highest = max(m.allocated for m in moments) + found.components["context"]
    assert (ticks[0] - min(tops)) / per_gib == pytest.approx(highest / 2**30, abs=0.02)


def test_plan_as_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.html"
    assert cli.main(["plan", "tinyllama-1.1b", "--gpu", "gtx1650-gddr5", "--html", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    page = Read(text)
    assert "Fits: 3.55 of 3.81" in page.text
    assert page.active() == ["script"]
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)
    assert script
    policy = next(meta["content"] for meta in page.named("meta") if meta.get("http-equiv"))
    assert base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode() in policy
    assert set(re.findall(r"https?://[^\s\"]+", text)) <= {"http://www.w3.org/2000/svg"}
    capsys.readouterr()
    assert cli.main(["plan", "phi-2", "--gpu", "t4", "--html", str(tmp_path)]) == 2
    assert "expected the name of a file" in capsys.readouterr().err


def test_auto_without_torch_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="name a card"):
        load_card("auto")
