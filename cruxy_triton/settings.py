"""Every setting of a run, declared once: name, type, default, help, range, unit, flag and the commands that take it.

Made from `SETTINGS`: both command lines, `finetune.recipe.Recipe`, `planner.plan.Configuration`, validation, what the
planner's search may choose, and the command that a plan prints. Names are those of TRL and peft. All of it is plain
data, and nothing heavy is imported, so that a form can be made from it as well.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cruxy_triton.errors import UserError

MIB, GIB = 1 << 20, 1 << 30
PLAN, FINETUNE, BOTH = ("plan",), ("finetune",), ("plan", "finetune")

# Peak learning rate where none is given, for models of a billion parameters: adamw's is the one of the QLoRA paper
# (arXiv 2305.14314, table 9); cruxy's is twice that, because its throttle halves the rate early in a run, and the
# Lion rule's a half, the ratio of the best rates on the demo task. sgd's gradients are clipped at norm 1, so that its
# rate is the length of a step: about what adamw's comes to on ten million adapter parameters (2e-4 * sqrt(1e7)).
DEFAULT_LR = {"cruxy": 4e-4, "cruxy-lion": 1e-4, "adamw": 2e-4, "sgd": 0.5}
# The same where every weight learns: a tenth of adamw's, the usual one there; the others in proportion, but for the
# Lion rule's, which is adamw's. Each tensor is clipped against its own history, so that the norms bound no rate.
FULL_LR = {"cruxy": 4e-5, "cruxy-lion": 2e-5, "adamw": 2e-5, "sgd": 0.5}
BATCH_SIZE = 8
TORCHS = ("adamw", "sgd")  # optimizers that are not CruxyOptimizer
STATE_BITS = {"cruxy": (32, 8), "cruxy-lion": (32, 8, 4), "adamw": (32,), "sgd": (32,)}
ALL_LINEAR = "all-linear"  # peft's name for every linear layer but the head
AUTO = "auto"  # of --lr: the best of a few rates that are tried before the run
GIVEN = ("given",)  # of `only_with`: any value that is not None


# -- one setting -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A setting as data. Bounds: minimum and maximum are allowed themselves, above and below are not.

    kind: "text", "int", "float", "switch", "size" (bytes), "names" (a list of words) or "pattern" (NAME=NUMBER words).
    left_open: what decides where nothing is given, in words. default: None where that is not known before the run.
    searched: `plan` looks for the best value where none is given, whatever `finetune`'s default is.
    configures: one of the planner's `Configuration`, that is, it decides memory, or what a plan must hand on.
    only_with: (another setting, values of it) without which this one has no effect.
    also: words that may stand in the place of a number. aliases: further flags.
    largest: of a pattern, whose numbers are whole then.
    """

    name: str
    kind: str
    default: Any
    help: str
    group: str
    commands: tuple[str, ...] = FINETUNE
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    unit: str = ""
    metavar: str = ""
    flag: str = ""
    left_open: str = ""
    required: bool = False
    searched: bool = False
    configures: bool = False
    only_with: tuple[str, tuple[Any, ...]] | None = None
    also: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    largest: int | None = None

    @property
    def of_adapters(self) -> bool:
        return self.only_with == ("method", ("lora",))

    @property
    def expected(self) -> str:
        """What may be given, in words."""
        return " or ".join([self._expected, *self.also])

    @property
    def _expected(self) -> str:
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        if self.kind not in ("int", "float"):
            words = {"switch": "true or false", "names": "at least one name", "size": "an amount of memory, as 4GiB",
                     "pattern": "names of layers with numbers above 0, as q_proj=8,v_proj=16"}  # fmt: skip
            return words.get(self.kind, "some text")
        noun = "a whole number" if self.kind == "int" else "a finite number"
        unit = f" {self.unit}" if self.unit else ""
        if self.above is not None:
            return f"{noun} " + (f"between {self.above} and {self.below}" if self.below else f"above {self.above}")
        upper = f" to {self.maximum}" if self.maximum is not None else f" to below {self.below}" if self.below else ""
        return f"{noun} from {self.minimum}{upper}{unit}" if upper else f"{noun} of at least {self.minimum}{unit}"

    def explained(self, command: str) -> str:
        """The help text, with what holds where nothing is given."""
        if command == "plan" and self.searched:
            default = "searched"
        elif self.required and not self.left_open:
            return self.help
        else:
            shown = {True: "on", False: "off"}.get(self.default) if self.kind == "switch" else str(self.default)
            default = self.left_open or (" ".join(self.default) if self.kind == "names" else shown)
        return f"{self.help} (default: {default})"

    def refuse(self, value: Any) -> UserError:
        near = suggestion(str(value), map(str, self.choices))
        return UserError(f"{self.flag or self.metavar} is {value!r}; expected {self.expected}{near}")

    def check(self, value: Any) -> Any:
        """`value` in the setting's own type; raises UserError where it cannot be used. None stays: left open."""
        if value is None and self.default is None and not self.required:
            return None
        if value in self.also:
            return value
        if self.kind == "size" and isinstance(value, (int, str)) and not isinstance(value, bool):
            return parse_bytes(value)
        if self.kind == "names":
            return self._names(value)
        if self.kind == "pattern":
            return self._pattern(value)
        if self.kind in ("int", "float"):
            fine = self._in_range(value)
        else:
            fine = isinstance(value, bool) if self.kind == "switch" else isinstance(value, str) and bool(value.strip())
        if not fine or (self.choices and value not in self.choices):
            raise self.refuse(value)
        return value

    def _names(self, value: Any) -> list[str]:
        words = value.split(",") if isinstance(value, str) else value
        if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
            raise self.refuse(value)
        names = list(dict.fromkeys(word.strip() for word in words if word.strip()))
        if not names:
            raise self.refuse("")
        return [ALL_LINEAR] if "all" in names or ALL_LINEAR in names else names

    def _pattern(self, value: Any) -> list[str]:
        words = value.split(",") if isinstance(value, str) else value
        if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
            raise self.refuse(value)
        found = [word.strip() for word in words if word.strip()]
        try:
            pattern = pattern_of(found)
            for name, number in pattern.items():
                re.compile(name)
                if not name or not 0 < number < math.inf:
                    raise ValueError
                if self.largest is not None and (number > self.largest or number != int(number)):
                    raise ValueError
        except (ValueError, re.error):
            raise self.refuse(value) from None
        if len(pattern) < len(found):  # a name that comes twice
            raise self.refuse(value)
        return found

    def _in_range(self, value: Any) -> bool:
        kinds = int if self.kind == "int" else (int, float)
        return (
            isinstance(value, kinds)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def parse(self, text: str) -> Any:
        """The value that a word of the command line stands for."""
        value: Any = text
        if self.kind in ("int", "float") and text not in self.also:
            try:
                value = int(text) if self.kind == "int" else float(text)
            except ValueError:
                raise self.refuse(text) from None
        return self.check(value)

    def words(self, value: Any) -> list[str]:
        """The words of the command line that stand for `value`."""
        if self.kind == "switch":
            return [self.flag if value else f"--no-{self.flag[2:]}"]
        if self.kind in ("names", "pattern"):
            return [self.flag, ",".join(value)]
        if self.kind == "size":
            return [self.flag, f"{value // MIB}MiB" if value % MIB == 0 else str(value)]
        return [self.flag, str(int(value) if isinstance(value, float) and value == int(value) else value)]


def parse_bytes(text: str | int) -> int:
    """`"4GiB"`, `"3900 MiB"`, `"6g"` or a number of bytes as an int.

    K, M, G, T and KiB, MiB, GiB, TiB count in 1024s, as nvidia-smi does; kB, MB, GB, TB in 1000s. Raises UserError for
    anything else, and for budgets below 256 MiB or above 4 TiB, which nobody means.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(?:([kmgt])(i?)(b?)|b?)\s*", str(text), re.IGNORECASE)
    if match is None:
        raise UserError(f"not an amount of memory: {text!r}; expected something like 4GiB, 3900MiB or plain bytes")
    base = 1000 if match[4] and not match[3] else 1024
    value = float(match[1]) * base ** " kmgt".index((match[2] or " ").lower())
    if not 256 * MIB <= value <= 4096 * GIB:
        raise UserError(
            f"a budget of {text} is {value / GIB:.4g} GiB; expected 256 MiB to 4 TiB. "
            "Was the unit forgotten? Write for example 4GiB"
        )
    return int(value)


def pattern_of(words: Iterable[str]) -> dict[str, float]:
    """peft's rank_pattern or alpha_pattern from its words, NAME=NUMBER; raises ValueError for others."""
    pairs = (word.rpartition("=") for word in words)
    return {name.strip(): float(number) for name, _, number in pairs}


def ranks_of(names: Iterable[str], rank: int, words: Iterable[str]) -> dict[str, int]:
    """The rank of the adapter on each kind of linear layer, by its name.

    A pattern that may concern some layers of a kind only (model.layers.0.mlp.up_proj) counts for all of them where it
    is the larger rank: what is planned with it is an upper bound.
    """
    found = {}
    for name in names:
        all_of_them, some = [], []
        for key, number in pattern_of(words).items():
            last = key.rpartition(".")[2]
            if re.fullmatch(key, name):
                all_of_them.append(int(number))
            elif not last.isidentifier() or last == name:
                some.append(int(number))
        found[name] = max([*(all_of_them[:1] or [rank]), *some])
    return found


def suggestion(word: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for the known word that is nearest, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


# -- all of them -------------------------------------------------------------------------------------


def _setting(default: Any, help: str, *, group: str, **rest: Any) -> Any:
    metadata = {"default": default, "help": help, "group": group, **rest}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata={**metadata, "default": None, "required": True})
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_data = partial(_setting, group="data")
_model = partial(_setting, group="model and memory")
_memory = partial(_setting, group="model and memory", commands=BOTH, configures=True)
_lora = partial(_setting, group="LoRA", commands=BOTH, configures=True, only_with=("method", ("lora",)))
_training = partial(_setting, group="training")
_step = partial(_setting, group="training", commands=BOTH, configures=True)


@dataclass
class Settings:
    """What a run is set to. Made with settings left open (None), which the plan decides or the data.

    Lengths are in tokens, memory in bytes, fractions between 0 and 1. Raises UserError naming the first setting that
    cannot be used.
    """

    model: str = _setting(
        dataclasses.MISSING, "Hugging Face id, or a folder with a model", group="", flag="", metavar="MODEL",
        commands=BOTH,
    )  # fmt: skip
    data: str = _data(dataclasses.MISSING, "JSONL, plain text (.txt), or a datasets id", metavar="FILE")
    output: str = _data(dataclasses.MISSING, "output folder", metavar="DIR", left_open="runs/<model>-<data>")

    subset: str | None = _data(None, "subset (configuration) of a datasets id", metavar="NAME", left_open="none")
    split: str = _data("train", "split of a datasets id", metavar="NAME")
    eval_data: str | None = _data(None, "held-out records", metavar="FILE", left_open="split off --data")
    eval_fraction: float = _data(0.05, "fraction of --data to hold out", above=0, below=1, metavar="F",
                                 only_with=("eval_data", (None,)))  # fmt: skip
    max_eval_samples: int = _data(200, "evaluate on at most so many records", minimum=1, metavar="N")
    chat_template: bool = _data(True, "ask through the model's chat template, where it has one")
    max_seq_length: int | None = _data(
        None, "longest sequence", minimum=8, unit="tokens", metavar="TOKENS", left_open="planned", commands=BOTH,
        configures=True, searched=True,
    )  # fmt: skip

    revision: str | None = _model(None, "revision of a Hugging Face id", metavar="NAME", left_open="main")
    trust_remote_code: bool = _model(False, "run code that comes with the model")
    dtype: str = _memory("auto", "base weights; auto: bfloat16 from compute capability 8.0, else float16; float32 on "
                         "a CPU", choices=("auto", "float16", "bfloat16", "float32"))  # fmt: skip
    load_in_4bit: bool = _memory(False, "4-bit NF4 base weights (bitsandbytes)", searched=True)
    double_quant: bool = _memory(True, "quantize the 4-bit scales too", searched=True,
                                 only_with=("load_in_4bit", (True,)))  # fmt: skip
    device: str = _memory("auto", "where to train; auto: the GPU where there is one", choices=("auto", "cpu", "cuda"))
    vram_bytes: int | None = _memory(
        None, "memory that the process may take, as 4GiB; on a CPU its RAM", kind="size", unit="bytes", flag="--vram",
        metavar="SIZE", left_open="what the device has",
    )  # fmt: skip
    attention: str | None = _memory(
        None, "attention kernel; flash: PyTorch's own choice from compute capability 8.0; efficient: the "
        "memory-efficient one on repeated heads", choices=("flash", "efficient", "eager", "math", "sdpa-cpu"),
        left_open="planned", searched=True,
    )  # fmt: skip
    gradient_checkpointing: bool | None = _memory(
        None, "recompute activations in the backward pass", left_open="planned", searched=True
    )
    chunked_loss: bool = _memory(None, "the loss in tiles (TRL); without it whole logits (transformers)", searched=True,
                                 left_open="on; planned with --method full")  # fmt: skip
    release: bool = _memory(None, "each layer learns in the backward pass and its gradients go at once; every "
                            "micro-batch is a step", searched=True, only_with=("method", ("full",)),
                            left_open="on with a cruxy optimizer and whole batches")  # fmt: skip

    method: str = _setting("lora", "what learns: adapters, or every weight", group="LoRA",
                           commands=BOTH, configures=True, choices=("lora", "full"))  # fmt: skip
    lora_r: int = _lora(16, "rank of the adapters", minimum=1, maximum=4096, metavar="R", searched=True)
    lora_alpha: float = _lora(None, "scale of the adapters is A/R", above=0, metavar="A", left_open="twice R")
    lora_dropout: float = _lora(0.0, "dropout before the adapters", minimum=0, below=1, metavar="P")
    use_rslora: bool = _lora(False, "scale A/sqrt(R) in place of A/R (rsLoRA)", commands=FINETUNE, configures=False)
    loraplus_lr_ratio: float = _lora(1.0, "learning rate of the B matrices over that of the A matrices (LoRA+)",
                                     above=0, metavar="N", commands=FINETUNE, configures=False)  # fmt: skip
    use_dora: bool = _lora(False, "learn length and direction of the weights' rows apart (DoRA)")
    rank_pattern: list[str] = _lora(  # noqa: RUF009 (a field with a factory)
        [], "other ranks for some layers, by peft's patterns, as q_proj=8,v_proj=32", kind="pattern", largest=4096,
        metavar="NAME=R", left_open="none",
    )  # fmt: skip
    alpha_pattern: list[str] = _lora(  # noqa: RUF009 (a field with a factory)
        [], "other scales for some layers, as q_proj=16,v_proj=64", kind="pattern", metavar="NAME=A", left_open="none",
        commands=FINETUNE, configures=False,
    )  # fmt: skip
    target_modules: list[str] = _lora(  # noqa: RUF009 (a field with a factory)
        [ALL_LINEAR], "layers with adapters, as A B or A,B", metavar="NAME", searched=True
    )

    optimizer: str = _step(None, "cruxy and cruxy-lion are CruxyOptimizer with the AdamW and the Lion rule, adamw "
                           "and sgd are torch's", choices=tuple(STATE_BITS), searched=True,
                           left_open="cruxy; cruxy-lion with --method full")  # fmt: skip
    mode: str = _training("meta3", "control law of CruxyOptimizer", choices=("meta3", "stability_v2", "stability_v1"),
                          only_with=("optimizer", ("cruxy", "cruxy-lion")))  # fmt: skip
    state_bits: int = _step(None, "bits of the optimizer's state; 8 with cruxy, 8 or 4 with cruxy-lion",
                            choices=(32, 8, 4), searched=True, left_open="32; planned with --method full")  # fmt: skip
    lr: Any = _training(  # noqa: RUF009 (a number, or a word in its place)
        None, "peak learning rate; auto: the best of a few, each tried for 12 steps; meta3 uses half in a short run",
        kind="float", minimum=0, metavar="LR", also=(AUTO,), aliases=("--learning-rate",),
        left_open="by optimizer: " + ", ".join(f"{name} {rate:g}" for name, rate in DEFAULT_LR.items())
        + "; with --method full " + ", ".join(f"{name} {rate:g}" for name, rate in FULL_LR.items()),
    )  # fmt: skip
    weight_decay: float = _training(0.0, "decoupled weight decay (sgd: L2)", minimum=0, metavar="W")
    lr_schedule: str = _training("linear", "after the warm-up", choices=("constant", "linear", "cosine"))
    warmup_fraction: float = _training(0.03, "part of the steps to warm up in", minimum=0, below=1, metavar="F",
                                       only_with=("lr_schedule", ("linear", "cosine")))  # fmt: skip
    clip: str = _training(None, "of the gradient: its whole norm, each tensor against its own history, or not at "
                          "all", choices=("global", "tensor", "none"),
                          left_open="global; tensor with --method full and a cruxy optimizer")  # fmt: skip
    layerwise: str = _training("none", "a step size for each layer by its gradients, or one for all",
                               choices=("none", "blade", "sketch_align"))  # fmt: skip
    guard: str = _training("act", "what watches the run: keeps it alive, only writes down what it would do, or nothing",
                           choices=("act", "observe", "off"))  # fmt: skip
    batch_size: int = _step(None, "sequences per optimizer step", minimum=1, maximum=1_000_000, metavar="N",
                            left_open=f"{BATCH_SIZE}; with --release planned, at most that")  # fmt: skip
    micro_batch_size: int | None = _step(
        None, "sequences per forward pass; divides --batch-size", minimum=1, maximum=4096, metavar="N",
        left_open="planned", searched=True,
    )  # fmt: skip
    epochs: float = _training(1.0, "passes over the data", above=0, metavar="N", only_with=("max_steps", (None,)))
    max_steps: int | None = _training(None, "stop after so many optimizer steps", minimum=1, metavar="N",
                                      left_open="by --epochs")  # fmt: skip
    seed: int = _training(0, "of the adapters, the order of the data and dropout", minimum=0, maximum=2**32 - 1,
                          metavar="N")  # fmt: skip
    save_steps: int = _training(50, "steps between checkpoints", minimum=1, metavar="N")
    report_to: str = _training("none", "where the rows of metrics.jsonl go as well",
                               choices=("none", "tensorboard", "wandb", "trackio"))  # fmt: skip
    retry: bool = _training(True, "when memory runs out, go on with the next configuration that makes the same steps "
                            "in less")  # fmt: skip
    eval_steps: int | None = _training(None, "steps between evaluations on held-out records", minimum=1, metavar="N",
                                       left_open="only before and after")  # fmt: skip
    early_stopping_patience: int | None = _training(
        None, "stop after so many evaluations in a row without a lower held-out loss", minimum=1, metavar="N",
        left_open="never",
    )  # fmt: skip
    early_stopping_threshold: float = _training(
        0.0, "by how much the held-out loss must fall to count as lower", minimum=0, metavar="D",
        only_with=("early_stopping_patience", GIVEN),
    )  # fmt: skip
    load_best_model_at_end: bool = _training(
        True, "the adapter is that of the evaluation with the lowest held-out loss", only_with=("eval_steps", GIVEN)
    )
    samples: int = _training(5, "held-out prompts that the report answers, before and after", minimum=0, metavar="N")
    sample_tokens: int = _training(48, "length of such an answer; 0 for none", minimum=0, metavar="N")

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            if hasattr(self, name) and not (name in ("model", "data") and getattr(self, name) == ""):
                setattr(self, name, setting.check(getattr(self, name)))
        for name, value in derived(vars(self)).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_together(vars(self))


def _declared() -> dict[str, Setting]:
    kinds = {"str": "text", "bool": "switch", "list[str]": "names"}
    found = {}
    for field in dataclasses.fields(Settings):
        plain = str(field.type).removesuffix(" | None")
        values = {"kind": kinds.get(plain, plain), "flag": "--" + field.name.replace("_", "-"), **field.metadata}
        found[field.name] = Setting(name=field.name, **values)
    extra = [
        Setting("gpu", "text", None, "a card of profiles/gpus, a .toml file, or auto", "card", PLAN, flag="--gpu",
                metavar="NAME", left_open="auto"),
        Setting("os", "text", None, "decides how much of a --gpu is usable", "card", PLAN, flag="--os",
                choices=("linux", "linux-desktop", "windows"), left_open="linux"),
        Setting("capability", "text", None, "compute capability of a --vram budget", "card", PLAN,
                flag="--capability", metavar="X.Y", left_open="7.5", choices=(
                    "7.0", "7.2", "7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1")),
        Setting("record_gradients", "int", 0, "save the gradients of the first N steps", "training", minimum=0,
                flag="--record-gradients", metavar="N"),
    ]  # fmt: skip
    return found | {setting.name: setting for setting in extra}


SETTINGS: Mapping[str, Setting] = _declared()
CONFIGURES = tuple(name for name, setting in SETTINGS.items() if setting.configures)


def of_command(command: str) -> list[Setting]:
    """The settings that a command takes, in order."""
    return [setting for setting in SETTINGS.values() if command in setting.commands]


# -- settings together ---------------------------------------------------------------------------------


def check_together(values: Mapping[str, Any]) -> None:
    """Raises UserError where settings that are given contradict each other; None is open and contradicts nothing."""
    optimizer, bits = values.get("optimizer"), values.get("state_bits")
    if optimizer is not None and bits is not None and bits not in STATE_BITS[optimizer]:
        able = " or ".join(name for name, kinds in STATE_BITS.items() if bits in kinds)
        kept = " or ".join(map(str, sorted(STATE_BITS[optimizer], reverse=True)))
        raise UserError(f"--state-bits {bits} is for --optimizer {able}; {optimizer} keeps {kept} bits")
    guard = values.get("guard")
    if values.get("clip") == "tensor" and optimizer in TORCHS and guard not in (None, "act"):
        raise UserError(
            f"--clip tensor with --optimizer {optimizer} is done by the guard, which --guard {guard} keeps from "
            "acting; give --guard act, or --optimizer cruxy, which clips inside its own update"
        )
    if values.get("early_stopping_patience") is not None and values.get("eval_steps") is None:
        raise UserError("--early-stopping-patience counts evaluations during the run; give --eval-steps N too")
    batch, micro = values.get("batch_size"), values.get("micro_batch_size")
    if batch is not None and micro is not None and batch % micro:
        raise UserError(
            f"--batch-size {batch} is not a multiple of --micro-batch-size {micro}; "
            "an optimizer step takes a whole number of micro-batches"
        )
    if values.get("method") == "full":
        if values.get("lr") == AUTO:
            raise UserError("--lr auto is for adapters, which are put back after each trial; give a rate")
        if values.get("load_in_4bit"):
            raise UserError("4-bit weights cannot learn; leave --load-in-4bit out of --method full, or take LoRA")
        if values.get("dtype") == "float16" and optimizer in TORCHS:
            raise UserError(
                f"--optimizer {optimizer} cannot train float16 weights: its state would be float16 too, and no "
                "GradScaler takes their gradients; give --optimizer cruxy-lion or cruxy, or --dtype float32"
            )
        if values.get("release"):
            _check_release(optimizer, batch, micro)
            if values.get("layerwise") not in (None, "none"):
                raise UserError(
                    f"--layerwise {values['layerwise']} compares the gradients of all layers, which --release frees "
                    "layer by layer; leave one of them out"
                )


def _check_release(optimizer: str | None, batch: int | None, micro: int | None) -> None:
    if optimizer in TORCHS:
        raise UserError(f"--release is for --optimizer cruxy or cruxy-lion; {optimizer} has no update in backward")
    if batch is not None and micro is not None and batch != micro:
        raise UserError(
            f"--release makes a step of every micro-batch: --batch-size {batch} has to be --micro-batch-size {micro}"
        )


def resolve_dtype(dtype: str, device: str, capability: tuple[int, int]) -> str:
    """The base weights' dtype, by request or by what `device` ("cpu" or "cuda") computes natively.

    Not torch.cuda.is_bf16_supported(): it answers True for emulation on cards before compute capability 8.0.
    """
    if dtype == "auto":
        return "float32" if device == "cpu" else "bfloat16" if capability >= (8, 0) else "float16"
    if dtype == "float16" and device == "cpu":
        raise UserError("--dtype float16 cannot train on a CPU (no gradient scaling there); use float32 or bfloat16")
    if dtype == "bfloat16" and device == "cuda" and capability < (8, 0):
        raise UserError(
            f"--dtype bfloat16: a card of compute capability {capability[0]}.{capability[1]} has no bfloat16 (8.0 "
            "needed; before, it is emulated, slower than float32); use float16"
        )
    return dtype


def without_effect(given: Mapping[str, Any], command: str) -> list[str]:
    """A sentence for each setting that is given and changes nothing, because of another one."""
    notes = []
    usual = defaults(given)
    for name in given:
        setting = SETTINGS[name]
        if setting.only_with is None:
            continue
        other, values = SETTINGS[setting.only_with[0]], setting.only_with[1]
        open_to_search = command == "plan" and other.searched and other.name not in given
        there = given.get(other.name, usual[other.name])
        met = there is not None if values == GIVEN else there in values
        if not met and not open_to_search:
            why = f"without {other.flag}" if there in (False, None) else f"with {other.flag} {there}"
            notes.append(f"{setting.flag} has no effect {why}")
    return notes


def refuse_adapters(given: Mapping[str, Any], method: str | None) -> None:
    """Raises UserError where a setting of adapters is given for a run that has none."""
    flags = [SETTINGS[name].flag for name in given if SETTINGS[name].of_adapters]
    if method == "full" and flags:
        them = "it" if len(flags) == 1 else "them"
        raise UserError(f"{', '.join(flags)} with --method full, which has no adapters; leave {them} out or take LoRA")


def derived(values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that follow from other settings; None is for the plan to decide."""
    full, batch, micro = values["method"] == "full", values.get("batch_size"), values.get("micro_batch_size")
    usual = "cruxy-lion" if full else "cruxy"
    optimizer = values["optimizer"] or usual
    # Where a step is of several micro-batches, or compares the layers, gradients have to wait for each other.
    alone = (None in (batch, micro) or batch == micro) and values.get("layerwise") in (None, "none")
    able = full and optimizer.startswith("cruxy") and alone
    release = able if values.get("release") is None else full and values["release"]
    return {
        "optimizer": usual,
        "state_bits": None if full and len(STATE_BITS[optimizer]) > 1 else 32,
        "lr": (FULL_LR if full else DEFAULT_LR)[optimizer],
        "chunked_loss": None if full else True,
        "release": able,
        "batch_size": None if release else BATCH_SIZE,
        "clip": "tensor" if full and optimizer.startswith("cruxy") else "global",
        "lora_alpha": 2 * values["lora_r"],
    }


def defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """What each setting is where nothing is given, beside `values`."""
    plain = {name: setting.default for name, setting in SETTINGS.items()}
    return plain | derived({**plain, **values})


def command_words(values: Mapping[str, Any]) -> list[str]:
    """The options of `finetune` that set `values` (a whole configuration); what it does anyway is left out."""
    words = []
    usual = defaults(values)
    for setting in of_command("finetune"):
        value = values.get(setting.name)
        if setting.only_with is not None and values.get(setting.only_with[0]) not in setting.only_with[1]:
            continue
        if value is not None and (list(value) if isinstance(value, tuple) else value) != usual[setting.name]:
            words += setting.words(value)
    return words


# -- names that settings had ---------------------------------------------------------------------------

_PLAIN = {f"--precision {name}": f"--dtype {full} --no-load-in-4bit" for full, names in {
    "float16": ("float16", "fp16", "half"), "bfloat16": ("bfloat16", "bf16"), "float32": ("float32", "fp32"),
}.items() for name in names}  # fmt: skip
# Of `plan`: the option, or the option with a value, that was, and what says the same now.
RENAMED = {
    "--seq": "--max-seq-length",
    "--batch": "--micro-batch-size",
    "--targets": "--target-modules",
    "--checkpointing": "--gradient-checkpointing",
    "--no-checkpointing": "--no-gradient-checkpointing",
    "--cpu": "--device cpu --vram",
    **_PLAIN,
    **{f"--precision {name}": "--load-in-4bit" for name in ("nf4", "4bit", "int4")},
    "--optimizer adamw-fp32": "--optimizer cruxy",
    "--optimizer lion-fp32": "--optimizer cruxy-lion --state-bits 32",
    "--optimizer lion-8bit": "--optimizer cruxy-lion --state-bits 8",
    "--optimizer torch-adamw": "--optimizer adamw",
}
GONE = {
    "--accumulation": "--batch-size N is what an optimizer step sees, in micro-batches of --micro-batch-size",
    "--precision": "--dtype float16|bfloat16|float32, or --load-in-4bit",
}
