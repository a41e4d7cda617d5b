"""What was trained in use: a model of any kind by name (run, adapter, model, Hugging Face id), its answers, the merge.

Merging adds scale * B A to each weight in float32 and rounds once to the dtype that is written, so that what plain
transformers loads answers as base and adapter together do.
"""

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cruxy_triton import files
from cruxy_triton.errors import UserError
from cruxy_triton.finetune import load
from cruxy_triton.finetune.data import QUESTION_TEMPLATE
from cruxy_triton.finetune.recipe import Recipe

CONFIG = "adapter_config.json"


@dataclass
class Source:
    """What a name stands for: a base model, an adapter on it (or none), and how its training asked."""

    base: str
    revision: str | None = None
    adapter: Path | None = None
    asked: str | None = None  # as `Data.asked` says; None where nothing is known of a training

    @property
    def name(self) -> str:
        return self.base if self.adapter is None else str(self.adapter)


def find(name: str, base: str | None = None) -> Source:
    """What `name` stands for: the folder of a run, of its result, of an adapter, of a model, or a Hugging Face id.

    `base` takes the place of the base model that the adapter's own config names. Raises UserError for a folder that
    is none of them, and where the base model was a folder that is not here.
    """
    folder = Path(name).expanduser()
    run: dict[str, Any] = {}
    if (folder / "run.json").is_file():
        run = _read(folder / "run.json")
        full = run.get("recipe", {}).get("method") == "full"
        result, wanted = ("model", "config.json") if full else ("adapter", CONFIG)
        if not (folder / result / wanted).is_file():
            raise UserError(
                f"the run in {folder} has no {result} (it is {run.get('status', 'unfinished')}); finish it with "
                f"`cruxy-triton finetune --resume --output {folder}`"
            )
        folder = folder / result
    elif folder.name in ("adapter", "merged", "model") and (folder.parent / "run.json").is_file():
        run = _read(folder.parent / "run.json")
    asked = run.get("records", {}).get("asked")
    if not (folder / CONFIG).is_file():
        if base is not None:
            raise UserError(f"--base is for an adapter, and {name} holds none (no {CONFIG})")
        return Source(str(folder) if run else name, asked=asked)
    config = _read(folder / CONFIG)
    named = base or config.get("base_model_name_or_path")
    if not named:
        raise UserError(f"{folder / CONFIG} names no base model; give it with --base")
    if base is None and named.startswith(("/", "~", ".")) and not Path(named).expanduser().is_dir():
        raise UserError(
            f"the adapter in {folder} belongs to the model in {named}, which is not here; give its folder or Hugging "
            "Face id with --base"
        )
    return Source(
        base=named,
        revision=config.get("revision") if base is None else None,
        adapter=folder,
        asked=asked,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found


def open_model(source: Source, **settings: Any) -> tuple[Any, Any, Any]:
    """(model, tokenizer, its base's config), the model in evaluation mode; `settings` are those of a Recipe.

    Raises UserError where the base cannot be loaded, and where base and adapter do not belong together.
    """
    recipe = Recipe(model=source.base, data="", output="-", revision=source.revision, **settings)
    device = load.device_of(recipe)
    dtype = load.dtype_of(recipe, device)
    config = load.config_of(recipe)
    shown = recipe
    if source.adapter is not None and (source.adapter / "tokenizer_config.json").is_file():
        shown = Recipe(model=str(source.adapter), data="", output="-", trust_remote_code=recipe.trust_remote_code)
    tokenizer = load.tokenizer_of(shown, config)
    model, _ = load.model_of(recipe, config, device, dtype)
    if source.adapter is not None:
        model = _with_adapter(model, source)
    model.config.use_cache = True
    return model.eval(), tokenizer, config


def _with_adapter(model: Any, source: Source) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, str(source.adapter))
    except Exception as error:  # peft and safetensors have no common one
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"the adapter in {source.adapter} cannot be put on {source.base}: {first}") from error
    # Adapter weights that are not in the file stay as they were drawn, and peft only warns of it.
    if missing := [str(w.message) for w in said if "missing adapter keys" in str(w.message)]:
        first = missing[0].partition("\n")[0][:200]
        raise UserError(f"the adapter in {source.adapter} is not whole, or not for {source.base}: {first}")
    return adapted


class Talk:
    """A conversation with a model: `ask` answers, and knows what was said before where there is a chat template."""

    def __init__(self, model: Any, tokenizer: Any, source: Source, *, raw: bool = False, system: str | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.chat = not raw and source.asked in (None, "chat") and tokenizer.chat_template is not None
        self.template = QUESTION_TEMPLATE if source.asked == "question" and not raw else None
        self.limit = load.max_length_of(model.config)
        if system is not None and not self.chat:
            raise UserError(f"--system needs a chat template, which {source.name} does not have or does not use")
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.said: list[dict[str, str]] = []

    def ids(self, said: Sequence[dict[str, str]]) -> list[int]:
        """The prompt's tokens, as in training."""
        if self.chat:
            asked = [*self.system, *said]
            return self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        text = said[-1]["content"]
        return self.tokenizer(text if self.template is None else self.template.format(question=text))["input_ids"]

    def ask(self, text: str, count: int, *, temperature: float = 0.0, show: Callable[[str], None] | None = None) -> str:
        """The model's answer of at most `count` tokens: greedy, or drawn at `temperature`; `show` gets its pieces.

        The oldest turns are forgotten when all of them do not fit. Raises UserError where the question alone does not.
        """
        said = [*self.said, {"role": "user", "content": text}] if self.chat else [{"role": "user", "content": text}]
        ids = self.ids(said)
        while self.limit is not None and len(ids) + count > self.limit:
            if len(said) < 3:
                raise UserError(
                    f"a prompt of {len(ids)} tokens and an answer of {count} do not fit the {self.limit} tokens of the "
                    "model; shorten the prompt or give a smaller --max-new-tokens"
                )
            said = said[2:]
            ids = self.ids(said)
        prompt = torch.tensor([ids], device=next(self.model.parameters()).device)
        drawn = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        with torch.no_grad():
            output = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                eos_token_id=self._ends(),
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=None if show is None else _streamer(self.tokenizer, show),
                **drawn,
            )
        answer = self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()
        self.said = [*said, {"role": "assistant", "content": answer}]
        return answer

    def _ends(self) -> list[int]:
        named = self.model.generation_config.eos_token_id
        more = named if isinstance(named, list) else [] if named is None else [named]
        return sorted({self.tokenizer.eos_token_id, *more})


def _streamer(tokenizer: Any, show: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _untie(model: Any) -> None:
    """Gives the head a table of its own where it shares one with embeddings that have an adapter."""
    head = model.get_output_embeddings()
    table = getattr(model.get_input_embeddings(), "base_layer", None)
    if head is not None and table is not None and head.weight is table.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False


def merge(source: Source, output: Path, dtype: str | None = None, **settings: Any) -> str:
    """Writes base and adapter as one model that plain transformers loads to the folder `output`; returns its dtype.

    `dtype` is that of the base's own checkpoint where it is None. Raises UserError where there is no adapter, where
    `output` is occupied, and for a base that is kept in 4 bits.
    """
    if source.adapter is None:
        raise UserError(f"{source.base} holds no adapter to merge; expected the folder of a run or of an adapter")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {output} is not empty; give another --output")
    model, tokenizer, config = open_model(source, device="cpu", dtype="float32", **settings)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{source.base} is kept in 4 bits, into which no adapter can be merged; give the plain model that it was "
            "made of with --base"
        )
    _untie(model)
    kept = dtype or str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied weights, which are right: see tests
            merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # what safe_merge finds
        raise UserError(f"the adapter in {source.adapter} cannot be merged: {error}") from error
    merged.to(getattr(torch, kept))
    merged.config.dtype = kept
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        with files.writing(output):
            merged.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            card = source.adapter / "README.md"
            if card.is_file():
                text = card.read_text(encoding="utf-8").replace("library_name: peft", "library_name: transformers")
                note = (
                    f"\nThe adapter is merged into the weights here ({kept}): plain transformers loads this folder.\n"
                )
                (partial / "README.md").write_text(text + note, encoding="utf-8")
            for path in partial.iterdir():
                files.make_readable(path)
            partial.chmod(0o755)
            if output.exists():
                output.rmdir()
            files.move_folder(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return kept
