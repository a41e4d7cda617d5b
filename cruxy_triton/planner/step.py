"""One training step, as everything that decides its memory."""

from __future__ import annotations

from dataclasses import dataclass

from cruxy_triton.planner.shape import ModelShape

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Step:
    """Lengths are tokens."""

    shape: ModelShape
    batch: int
    seq: int
    precision: str = "float16"
    beside_nf4: str = "float16"  # the dtype of what "nf4" does not quantize, and of what it computes in
    double_quant: bool = True
    lora_r: int = 8  # 0: every weight learns
    targets: tuple[str, ...] = ()
    lora_dropout: float = 0.0
    use_dora: bool = False
    ranks: tuple[tuple[str, int], ...] = ()  # of adapters by the layer's name, where it is not `lora_r`
    checkpointing: bool = True
    chunked_loss: bool = True
    attention: str = "efficient"
    optimizer: str = "adamw-fp32"
    accumulation: int = 1
    device: str = "cuda"
    cublas_workspace: int = 8_519_680
    autocast: bool = True
    upcast_outputs: bool = True  # accelerate's convert_outputs_to_fp32 around an autocast forward
    keep_outputs: bool = False  # the output object (with its logits) lives on until the optimizer is through
    warmup: bool = False  # from_pretrained(device_map=...) takes the weights' bytes once and gives them back
    ahead: int = 0  # weights that loading has put on the device before their turn to be quantized (`loading.load`)
    release: bool = False  # each layer learns in the backward pass and its gradients go (`release_gradients`)
    kbit_prepared: bool = False  # after peft's prepare_model_for_kbit_training: all unquantized weights in fp32

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def dtype(self) -> str:
        """Of the weights that are not quantized, as `finetune` loads them."""
        return self.beside_nf4 if self.precision == "nf4" else self.precision

    @property
    def width(self) -> int:
        """Bytes of an element of `dtype`."""
        return BYTES[self.dtype]

    @property
    def half(self) -> int:
        """Bytes of autocast's dtype, 0 without autocast."""
        return 2 if self.autocast else 0

    @property
    def stream(self) -> int:
        """Bytes of an element of the hidden states."""
        return 4 if self.kbit_prepared else self.width

    @property
    def round_to(self) -> int:
        """The allocator's unit in bytes: CUDA rounds up, the CPU's allocator counts what was asked for."""
        return 512 if self.device == "cuda" else 1

    def keeps_gradients(self, index: int, steps: int) -> bool:
        """Whether step `index` of `steps` leaves its gradients in place. Of accumulated micro-batches only the last
        matters, which finds the others' gradients: they are kept over from the step before it."""
        return self.accumulation > 1 and index < steps - 1

    def rank(self, name: str) -> int:
        return dict(self.ranks).get(name, self.lora_r)

    def lora_parameters(self) -> int:
        """Trainable elements of all adapters."""
        linears = [(x, count) for x, count in self.shape.all_linears() if x.name in self.targets]
        lengths = sum(x.rows * count for x, count in linears) if self.use_dora else 0
        return lengths + sum(self.rank(x.name) * (x.rows + x.cols) * count for x, count in linears)

    def trainable_parameters(self) -> int:
        return self.lora_parameters() if self.lora_r else self.shape.parameters
