"""Recipe: every setting of a fine-tuning run, as plain data that goes into `run.json` and comes back.

Fields that are None when a run starts are decided by the plan (memory) or by the data, and are filled
in before training; a finished `run.json` has none of them left open.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from cruxy_triton.errors import UserError

OPTIMIZERS = ("cruxy", "cruxy-lion", "adamw")
SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("auto", "float16", "bfloat16", "float32")
DEVICES = ("auto", "cpu", "cuda")

# Peak learning rate by optimizer when none is given, for models of a billion parameters: adamw's is the one of the
# QLoRA paper (arXiv 2305.14314, table 9); cruxy's is twice that, because its throttle halves the rate early in a
# run (equation 7), and the Lion rule's a half, the ratio of the best rates on the demo task (README, table).
DEFAULT_LR = {"cruxy": 4e-4, "cruxy-lion": 1e-4, "adamw": 2e-4}


@dataclass
class Recipe:
    """Settings of one run. Lengths are in tokens, `vram_bytes` in bytes, fractions between 0 and 1."""

    model: str
    data: str
    output: str

    # data
    subset: str | None = None
    split: str = "train"
    eval_data: str | None = None
    eval_fraction: float = 0.05
    max_eval_samples: int = 200
    chat_template: bool = True
    max_seq_length: int | None = None

    # model
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    load_in_4bit: bool = False
    double_quant: bool = True
    device: str = "auto"
    vram_bytes: int | None = None
    gradient_checkpointing: bool | None = None

    # LoRA
    lora_r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])

    # optimization
    optimizer: str = "cruxy"
    mode: str = "meta3"
    state_bits: int = 32
    lr: float | None = None
    weight_decay: float = 0.0
    lr_schedule: str = "linear"
    warmup_fraction: float = 0.03
    batch_size: int = 8
    micro_batch_size: int | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    seed: int = 0

    # bookkeeping
    save_steps: int = 50
    sample_tokens: int = 48

    def __post_init__(self) -> None:
        self.validate()

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        assert self.micro_batch_size is not None, "the plan decides the micro-batch size first"
        return self.batch_size // self.micro_batch_size

    def validate(self) -> None:
        """Raises UserError naming the first setting that cannot be used."""
        _choice("--optimizer", self.optimizer, OPTIMIZERS)
        _choice("--lr-schedule", self.lr_schedule, SCHEDULES)
        _choice("--dtype", self.dtype, DTYPES)
        _choice("--device", self.device, DEVICES)
        if self.state_bits not in (8, 32):
            raise UserError(f"--state-bits is {self.state_bits}; expected 8 or 32")
        if self.state_bits == 8 and self.optimizer != "cruxy-lion":
            raise UserError(f"--state-bits 8 is for --optimizer cruxy-lion; {self.optimizer} keeps 32 bits")
        for flag, value in (
            ("--batch-size", self.batch_size),
            ("--micro-batch-size", self.micro_batch_size),
            ("--lora-r", self.lora_r),
            ("--max-steps", self.max_steps),
            ("--save-steps", self.save_steps),
            ("--max-eval-samples", self.max_eval_samples),
        ):
            if value is not None and value < 1:
                raise UserError(f"{flag} is {value}; expected a whole number of at least 1")
        if self.max_seq_length is not None and self.max_seq_length < 8:
            raise UserError(f"--max-seq-length is {self.max_seq_length}; expected at least 8 tokens")
        if self.lr is not None and not 0 <= self.lr < float("inf"):
            raise UserError(f"--lr is {self.lr}; expected a finite number of at least 0")
        if not 0 < self.epochs < float("inf"):
            raise UserError(f"--epochs is {self.epochs}; expected a positive number")
        if not 0 < self.eval_fraction < 1:
            raise UserError(f"--eval-fraction is {self.eval_fraction}; expected a number between 0 and 1")
        if not 0 <= self.warmup_fraction < 1:
            raise UserError(f"--warmup-fraction is {self.warmup_fraction}; expected a number from 0 to below 1")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora-dropout is {self.lora_dropout}; expected a number from 0 to below 1")
        if not 0 <= self.weight_decay < float("inf"):
            raise UserError(f"--weight-decay is {self.weight_decay}; expected a finite number of at least 0")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise UserError(
                f"--batch-size {self.batch_size} is not a multiple of --micro-batch-size {self.micro_batch_size}; "
                "an optimizer step takes a whole number of micro-batches"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """The inverse of `to_dict`; raises UserError where settings are missing or unknown (another version's)."""
        known = {f.name for f in dataclasses.fields(cls)}
        if odd := sorted(set(values) ^ known):
            raise UserError(
                f"the recipe in run.json does not fit this version: {', '.join(odd)} missing or unknown; "
                "continue the run with the version that wrote it (run.json names it)"
            )
        return cls(**values)


def _choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{flag} is {value!r}; expected one of {', '.join(choices)}")
