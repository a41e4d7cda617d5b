"""The ladder: what the host decides from each reading, one step late, within the budgets.

    calm                        the learning-rate factor recovers, snapshots are taken and confirmed
    update ratio over its limit  the rate is too large for these weights: hold the ratio; early in a run, start again
    unstable, the loss high     cut the rate; reset momentum; roll back with a cut; stop
    not finite, again and again roll back, further each time; stop

A step that was only skipped or clipped has had its harm kept out already: the ladder climbs where the loss rises
(where nobody tells the loss: where gradients stay out of their history).
"""

from collections import deque
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from cruxy_triton.guard import events as E
from cruxy_triton.guard.actions import LearningRate, nonfinite_tensors, reset_momentum
from cruxy_triton.guard.events import Event, EventLog
from cruxy_triton.guard.policy import Policy
from cruxy_triton.guard.reading import Reading
from cruxy_triton.guard.regimes import Regime, Regimes
from cruxy_triton.guard.snapshot import Snapshot, Snapshots
from cruxy_triton.guard.statistics import LossStatistics

# A layer is reported as dead when its gradient is exactly 0 at this many looks, QUIET_INTERVAL steps apart.
QUIET_LOOKS, QUIET_INTERVAL = 3, 10
# The update ratio is judged as the mean of this many measurements: plain SGD may start with a few large steps.
RATIO_MEAN = 5


class Ladder:
    """Regime, learning-rate factor, snapshots and budgets of one run.

    `rolled_back` is set when parameters were put back: gradients made before are of other weights. `stopped` is the
    report of the end, else None.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module | None, policy: Policy, log: EventLog, folder: Any = None
    ):
        self.optimizer, self.policy, self.log = optimizer, policy, log
        self.regimes = Regimes(policy)
        self.loss = LossStatistics(policy.baseline_memory, policy.loss_sigmas)
        self.rate = LearningRate(policy)
        self.snapshots = Snapshots(optimizer, model, folder, self._say)
        self.ratio_limit, self.ratio_target = policy.update_ratio_limit, policy.update_ratio_target
        self.stopped: str | None = None
        self.rolled_back = False
        self.metrics: dict[str, Any] = {"step": 0, "regime": self.regimes.current.value, "lr_factor": 1.0}
        self.params: list[Tensor] = []
        self.names: list[str] = []
        self.baselines: Tensor | None = None  # the telemetry's, on the device
        self.step = 0
        self._skips: deque[bool] = deque(maxlen=policy.skip_window)
        self._bad_streak = 0  # non-finite steps in a row
        self._overflows = 0  # steps in a row that a loss scaler refused
        self._resets = self._rollbacks = 0
        self._reset = False  # momentum was reset in this spell of the unstable regime
        self._last_rollback = -(10**9)
        self._ratios: deque[float] = deque(maxlen=RATIO_MEAN)
        self._silent: dict[int, int] = {}
        self._ended = False

    def watch(self, params: list[Tensor], names: list[str], baselines: Tensor) -> None:
        """These are the optimizer's tensors from now on; snapshots of others are of no use any more."""
        if self.params:
            self.snapshots = Snapshots(self.optimizer, self.snapshots.model, self.snapshots.folder, self._say)
        self.params, self.names, self.baselines = params, names, baselines
        self._silent = {}

    # -- a reading -----------------------------------------------------------------------------------------

    def take(self, reading: Reading) -> None:
        """Judge one step's reading and act on it."""
        self.step = reading.step
        severity, rising = 0, reading.loss is None
        if reading.overflow:
            self._overflowed(reading)
        else:
            self._overflows = 0
            self._skips.append(reading.skipped)
            self._bad_streak = 0 if reading.finite else self._bad_streak + 1
            severity = self._gradients(reading)
            if reading.loss is not None and reading.finite:
                score = self.loss.update(reading.loss)
                reading.seen["loss_score"] = score
                rising = score > self.policy.loss_sigmas
                severity = max(severity, rising + (score > self.policy.loss_sigmas_severe))
        before = self.regimes.current
        regime = self.regimes.update(severity)
        if regime is not before:
            self._note(E.REGIME, f"{before.value} -> {regime.value} (pressure {self.regimes.pressure:.2f})", reading)
        if reading.step == 1 or reading.step % QUIET_INTERVAL == 0:
            self._dead_layers(reading)
        if not (reading.overflow or self._ended):
            self._climb(before, reading, severity if rising else 0)
        self.metrics = {
            **reading.seen, "step": reading.step, "regime": self.regimes.current.value,
            "pressure": self.regimes.pressure, "lr_factor": self.rate.factor if self.policy.act else 1.0,
            "skipped": reading.skipped, "clipped": reading.clipped, "loss_phase": self.loss.phase,
            "loss_variance_fast": self.loss.fast[1], "loss_variance_slow": self.loss.slow[1],
        }  # fmt: skip

    def _gradients(self, reading: Reading) -> int:
        """Events of a skipped or clipped step; its severity."""
        if not reading.finite:
            self._note(E.SKIP, f"the {reading.what} is not finite; step skipped", reading, cost="one step")
            return 2
        if reading.skipped:
            self._note(
                E.SKIP, f"gradient norm {reading.grad_norm:.3g}, {reading.score:.1f} deviations above its history; "
                "step skipped", reading, cost="one step",
            )  # fmt: skip
            return 2
        if reading.clipped and reading.worst > self.policy.clip_sigmas:  # tighter clipping is in the metrics only
            self._note(
                E.CLIP, f"clipped, {reading.worst:.1f} deviations above its own history "
                f"({reading.clipped} of {len(reading.norms) + 1} norms)", reading,
            )  # fmt: skip
        return int(reading.score > self.policy.clip_sigmas)

    def _overflowed(self, reading: Reading | None) -> None:
        self._overflows += 1
        if self._overflows < self.policy.max_overflows:
            self._note(E.OVERFLOW, "gradient overflow: the loss scaler lowers its scale, the step is skipped", reading)
        if self._overflows >= self.policy.max_overflows:
            self._stop(f"{self._overflows} overflows in a row: gradients overflow at any loss scale", reading)

    def overflowed(self) -> None:
        """A loss scaler refused a step, so that there is no reading of it."""
        self._overflowed(None)

    def _dead_layers(self, reading: Reading) -> None:
        """Say once of a layer whose gradient was there and is exactly 0 now."""
        quiet = set(reading.quiet)
        for i in range(len(reading.norms)):
            if i not in quiet:
                self._silent[i] = 0
            elif i in self._silent:
                self._silent[i] += 1
                if self._silent[i] == QUIET_LOOKS:
                    steps = QUIET_INTERVAL * (QUIET_LOOKS - 1)
                    message = f"a dead layer: its gradient is exactly 0 for {steps} steps"
                    self._note(E.NOTE, message, reading, layers=[i])

    # -- the steps of the ladder ----------------------------------------------------------------------------

    def _climb(self, before: Regime, reading: Reading, severity: int) -> None:
        """`severity` is the step's where the loss is high, else 0."""
        policy, regimes = self.policy, self.regimes
        calm = regimes.pressure < policy.calm_at
        if self._bad_streak in (2, policy.max_consecutive_skips) and self._not_finite(reading):
            return None
        if sum(self._skips) > policy.max_skips:
            return self._escalate(f"{sum(self._skips)} of the last {len(self._skips)} steps were skipped", reading)
        ratio, limit = reading.update_ratio, self.ratio_limit
        if ratio is not None and limit is not None and self._too_large(ratio, limit, reading, calm):
            return None
        since = regimes.since
        self._reset = self._reset and regimes.current is Regime.UNSTABLE
        if regimes.current is Regime.UNSTABLE and severity:
            if before is Regime.WARMING:
                return self._escalate("unstable from the start", reading)
            if since >= policy.rollback_after:
                return self._escalate(f"unstable for {since} steps", reading)
            if since >= policy.reset_after and not self._reset and self._resets < policy.max_momentum_resets:
                self._resets, self._reset = self._resets + 1, True
                if policy.act:
                    reset_momentum(self.optimizer)
                self._note(E.RESET, "still unstable: momentum reset", reading, cost="the momentum of some ten steps")
            elif since % policy.cut_interval == 0 and self.rate.cut(policy.lr_cut):
                self._note(E.LR, f"unstable: learning rate x {self.rate.factor:.3g}", reading)
        elif calm and self.rate.target is None and self.rate.factor < 1:
            self.rate.recover()
            if self.rate.factor == 1.0:
                self._note(E.LR, "learning rate back at x 1", reading)
        return self._keep_snapshots(calm, rising=severity > 0)

    def _not_finite(self, reading: Reading) -> bool:
        """Nothing finite comes any more: is it the weights? True where something was done."""
        streak = self._bad_streak
        broken = nonfinite_tensors(zip(self.names, self.params, strict=True))
        if not broken and streak < self.policy.max_consecutive_skips:
            return False
        self._bad_streak = 0
        reason = f"{streak} steps in a row were not finite"
        if broken:
            # With good weights the rate need not fall.
            layers = [self.names.index(name) for name in broken]
            self._escalate(f"{reason}: parameters hold NaN or infinity", reading, cut=False, layers=layers)
        else:
            self._escalate(f"{reason}, with finite parameters", reading)
        return True

    def _too_large(self, ratio: float, limit: float, reading: Reading, calm: bool) -> bool:
        """Hold the update-to-weight ratio once it was too large; True where the run starts again."""
        rate = self.rate
        if rate.target is not None:
            if not reading.skipped:
                rate.hold(ratio, calm=calm)
            return False
        if not reading.skipped:
            self._ratios.append(ratio)
        ratio = sum(self._ratios) / max(len(self._ratios), 1)
        if not ratio > limit:
            return False
        rate.target = self.ratio_target
        rate.factor = max(rate.factor * self.ratio_target / ratio, self.policy.min_lr_factor)
        found = f"a step changes the weights by {100 * ratio:.3g} % of their size (limit {100 * limit:.3g} %)"
        start = self.snapshots.first() if reading.step <= self.policy.warmup_steps else None
        if start is not None and self._rollbacks < self.policy.max_rollbacks:
            self._rollback(f"{found}: the learning rate is too large", start, reading)
            return True
        held = f"held at {100 * self.ratio_target:.3g} %, learning rate x {rate.factor:.3g}"
        self._note(E.LR, f"{found}: {held}", reading)
        return False

    def _escalate(self, reason: str, reading: Reading, *, cut: bool = True, layers: list[int] | None = None) -> None:
        """Roll back, further than last time where that was a moment ago; or stop."""
        self._skips.clear()
        if reading.step - self._last_rollback < 3 * self.policy.rollback_after:
            self.snapshots.drop_newest()
        snapshot = self.snapshots.newest()
        if snapshot is None:
            return self._stop(f"{reason}; no snapshot is kept", reading, layers)
        if self._rollbacks >= self.policy.max_rollbacks:
            return self._stop(f"{reason}; {self._rollbacks} rollbacks did not help", reading, layers)
        if cut:
            self.rate.cut(self.policy.rollback_cut)
        return self._rollback(reason, snapshot, reading, layers)

    def _rollback(self, reason: str, to: Snapshot, reading: Reading, layers: list[int] | None = None) -> None:
        self._rollbacks += 1
        self._last_rollback = reading.step
        self._note(
            E.ROLLBACK, f"{reason}; back to the weights after step {to.step}, learning rate x {self.rate.factor:.3g}",
            reading, layers=layers, cost=f"{reading.step - to.step} steps",
        )  # fmt: skip
        if self.policy.act:
            self._restore(to)
            self.rolled_back = True
        # If the loss is as high with good weights it is the data, and that is the level from now on.
        self.loss.reset()
        self.regimes.recover()

    def _stop(self, reason: str, reading: Reading | None, layers: list[int] | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        snapshot = self.snapshots.newest()
        event = self._note(E.STOP, f"stopped: {reason}", reading, layers=layers)
        if not self.policy.act:
            return
        report = [f"training stopped at step {self.step}: {reason}."]
        if event.layer:
            report.append(f"Where: {event.layer}.")
        if event.batch is not None:
            report.append(f"Last batch: {event.batch}.")
        if snapshot is not None:
            self._restore(snapshot)
            report.append(f"The weights are those after step {snapshot.step}.")
        self.stopped = " ".join(report) + "\n" + self.log.summary()

    def _restore(self, snapshot: Snapshot) -> None:
        baselines = self.snapshots.restore(snapshot)
        self.snapshots.discard_candidate()
        if self.baselines is not None:
            self.baselines.copy_(baselines)

    # -- snapshots ------------------------------------------------------------------------------------------

    def _keep_snapshots(self, calm: bool, rising: bool) -> None:
        snapshots, policy = self.snapshots, self.policy
        if rising:
            snapshots.discard_candidate()
        if not calm:
            return
        if snapshots.candidate is not None and self.step - snapshots.candidate.step >= policy.snapshot_confirm:
            snapshots.confirm()
        if self.step % policy.snapshot_interval == 0:
            self.take_snapshot(self.step)

    def take_snapshot(self, step: int) -> None:
        """Copy the state after `step` steps, to disk where it is large; of one that only observes, the step alone."""
        assert self.baselines is not None
        if not self.policy.act:
            self.snapshots.mark(step)
            return
        large = self.snapshots.bytes_needed() > self.policy.snapshot_max_bytes
        if not large or self.snapshots.folder is not None:
            self.snapshots.take(step, self.baselines, on_disk=large)

    # -- events and state ------------------------------------------------------------------------------------

    def _note(
        self, kind: str, message: str, reading: Reading | None, *, layers: list[int] | None = None, cost: str = ""
    ) -> Event:
        layers = layers if layers is not None or reading is None else reading.layers
        layer = None
        if layers:
            more = f" and {len(layers) - 1} more of {len(self.names)}" if len(layers) > 1 else ""
            whole = 1 < len(layers) == len(self.names)
            layer = f"all {len(layers)} tensors" if whole else self.names[layers[0]] + more
        event = Event(
            step=self.step, kind=kind, regime=self.regimes.current.value, message=message, layer=layer,
            batch=None if reading is None else E.plain(reading.batch),
            seen={} if reading is None else dict(reading.seen), cost=cost,
            acted=self.policy.act or kind not in E.ACTIONS,
        )  # fmt: skip
        self.log.add(event)
        return event

    def _say(self, sentence: str) -> None:
        self._note(E.NOTE, sentence, None)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "regimes": self.regimes.state_dict(),
            "loss": self.loss.state_dict(),
            "rate": self.rate.state_dict(),
            "skips": list(self._skips),
            "counts": [self._bad_streak, self._overflows, self._resets, self._rollbacks, self._last_rollback],
            "reset": self._reset,
            "ratios": list(self._ratios),
            "silent": dict(self._silent),
            "ratio": [self.ratio_limit, self.ratio_target],  # of adapters: those that began at zero no longer tell
            "snapshots": self.snapshots.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        self.regimes.load_state_dict(state["regimes"])
        self.loss.load_state_dict(state["loss"])
        self.rate.load_state_dict(state["rate"])
        self._skips = deque((bool(x) for x in state["skips"]), maxlen=self.policy.skip_window)
        self._bad_streak, self._overflows, self._resets, self._rollbacks, self._last_rollback = state["counts"]
        self._reset = bool(state["reset"])
        self._ratios = deque(state["ratios"], maxlen=RATIO_MEAN)
        self._silent = {int(k): int(v) for k, v in state["silent"].items()}
        if self.ratio_limit is not None and state["ratio"][0] is not None:
            self.ratio_limit, self.ratio_target = state["ratio"]
        self.snapshots.load_state_dict(state["snapshots"])
