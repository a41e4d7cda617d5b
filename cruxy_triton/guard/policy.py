"""Policy: every threshold, interval and budget of the guard, in one place.

The numbers are defaults that were tried on small language models (docs/guard.md has the table); a threshold "in
deviations" counts robust standard deviations of the tracked quantity, so it needs no knowledge of its scale.
"""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Policy:
    """What the guard may do, and when. `Policy(act=False)` only watches and reports.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    act: bool = True

    # Judged inside the step: gradients.
    clip: bool = True  # False: never
    clip_sigmas: float = 6.0  # clip a tensor, or the whole gradient, above its own history by this many deviations
    clip_sigmas_stressed: float = 3.0  # the same in every regime but warming and stable
    clip_tensors: bool = True  # tensor by tensor; False: only the global norm
    tensor_ratio: float | None = None  # AdaGC: clip a tensor at this multiple of its history (1.05 in the paper)
    skip_sigmas: float = 12.0  # skip a step whose gradient is this far out
    baseline_memory: int = 50  # steps that the baselines remember
    patience: int = 4  # outliers in a row that are a new level, not outliers

    # Regimes: severities (0, 1 or 2 per step) fill a bucket that leaks by `pressure_leak` a step.
    warmup_steps: int = 20  # steps before the regime may be stable
    loss_sigmas: float = 4.0  # loss above its level by this: severity 1
    loss_sigmas_severe: float = 8.0  # severity 2
    pressure_leak: float = 0.9
    stressed_at: float = 1.5
    unstable_at: float = 4.0
    calm_at: float = 0.25  # below: stressed ends
    recover_steps: int = 30  # calm steps before recovering ends

    # Learning-rate factor.
    min_lr_factor: float = 0.001
    lr_cut: float = 0.5  # on becoming unstable, and every `cut_interval` steps while it lasts
    cut_interval: int = 5
    lr_recovery: float = 1.02  # a calm step
    max_lr_cuts: int = 20

    # Update-to-weight ratio: what one step changes, relative to the size of the weights.
    update_ratio_limit: float | None = 0.09  # mean of five above: the rate is too large; None: not watched
    update_ratio_target: float = 0.02  # where the factor holds it from then on
    adapter_ratio: float = 5.0  # both times this where matrices begin at zero (LoRA)
    ratio_interval: int = 10  # steps between measurements (each of the first twenty steps is measured)

    # Momentum reset, rollback, stop.
    reset_after: int = 5  # steps in the unstable regime before momentum is reset
    max_momentum_resets: int = 3
    rollback_after: int = 10  # steps in the unstable regime before a rollback
    max_rollbacks: int = 5
    rollback_cut: float = 0.3
    snapshot_interval: int = 50
    snapshot_confirm: int = 10  # calm steps after which a snapshot counts as good
    snapshot_max_bytes: int = 2 << 30  # what is larger goes to disk, where a folder for it is given
    max_consecutive_skips: int = 5
    max_skips: int = 20  # among the last `skip_window` steps
    skip_window: int = 40
    max_overflows: int = 40  # steps in a row that a loss scaler refuses

    def __post_init__(self) -> None:
        for name in ("act", "clip", "clip_tensors"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected True or False")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ValueError(f"{field.name} is {value!r}; expected a whole number of at least 0")
            if field.type is float and not (isinstance(value, int | float) and 0 < value < float("inf")):
                raise ValueError(f"{field.name} is {value!r}; expected a positive number")
        for name in ("baseline_memory", "patience", "cut_interval", "ratio_interval", "snapshot_interval",
                     "max_consecutive_skips", "max_skips", "skip_window", "max_overflows"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("min_lr_factor", "lr_cut", "rollback_cut", "pressure_leak"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a value between 0 and 1")
        if self.lr_recovery < 1:
            raise ValueError(f"lr_recovery is {self.lr_recovery}; expected at least 1")
        if not self.calm_at < self.stressed_at < self.unstable_at:
            raise ValueError(
                f"calm_at, stressed_at, unstable_at are {self.calm_at}, {self.stressed_at}, {self.unstable_at}; "
                "expected them to rise: a regime is left at less pressure than it is entered with"
            )
        if not self.loss_sigmas <= self.loss_sigmas_severe:
            raise ValueError(f"loss_sigmas_severe is {self.loss_sigmas_severe}; expected at least {self.loss_sigmas}")
        if not self.clip_sigmas_stressed <= self.clip_sigmas <= self.skip_sigmas:
            raise ValueError("expected clip_sigmas_stressed <= clip_sigmas <= skip_sigmas")
        if self.tensor_ratio is not None and not self.tensor_ratio > 1:
            raise ValueError(f"tensor_ratio is {self.tensor_ratio}; expected more than 1, or None")
        if self.update_ratio_limit is not None and not 0 < self.update_ratio_target < self.update_ratio_limit:
            raise ValueError(
                f"update_ratio_target is {self.update_ratio_target} and update_ratio_limit {self.update_ratio_limit}; "
                "expected 0 < target < limit"
            )
