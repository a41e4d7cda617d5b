"""The control vector: named slots of one fp32 row per parameter group, and the constants of the laws.

`control` is one contiguous float32 tensor of shape (num_rows, NUM_SLOTS). A row belongs to a parameter
group (tensors that join a group later get a row of their own, with the same statistics and their own AGE).
The statistics are taken over all gradients together, so they are equal in every row; the base learning
rate, the betas and what follows from them are the row's own. Three runs of slots:

    [0, NUM_INPUTS)          inputs:  the host writes them, and only when one of them changes
    [NUM_INPUTS, OUTPUTS)    state:   what one step hands to the next; all of it is checkpointed
    [OUTPUTS, NUM_SLOTS)     outputs: what the updates and `metrics()` read

Only plain numbers are here, so that the Triton kernels may read them; KEY stands for all of them.
Constants: "paper" is the Cruxy white paper v2.1; "SDK" marks facts read off PyPI `cruxy` 2.1.0.
"""

import hashlib
import math

# -- inputs ------------------------------------------------------------------
LR = 0  # the group's learning rate: the user's and the scheduler's
WEIGHT_DECAY = 1
BETA1 = 2
BETA2 = 3
EPS = 4  # of the AdamW denominator
GAMMA = 5  # exponent of the gamma-norm (paper eq 1)
META_LR_ETA = 6  # kappa of paper eq 10
META_LR_BETA2 = 7  # the same for beta2
META_INTERVAL = 8  # N steps between two slow-loop updates
SCALE_MIN = 9  # bounds of LR_SCALE; -inf and inf switch them off
SCALE_MAX = 10
LR_MIN = 11  # bounds of LR_OUT in meta3 (the SDK's 1e-7 and 1e-2 when `bounds=None`)
LR_MAX = 12
# 1: outlier steps stay out of the statistics, the early warning may halve LR_SCALE, and stability_v2's LR_SCALE
# relaxes to 1. 0: the published laws.
GUARD = 13
MAXIMIZE = 14  # 1: ascend
SEED = 15  # of the random bits that 16-bit parameters are rounded with; a whole number below 2^24
NUM_INPUTS = 16

# -- state ------------------------------------------------------------------
STEP = 16  # steps taken (skipped ones not counted) by the optimizer
AGE = 17  # the same since this row exists: the t of the bias corrections
SKIPPED = 18  # steps skipped because of a non-finite gradient or loss
V_FAST = 19
V_SLOW = 20
CURVATURE = 21  # EMA of paper eq 4 (eq 5)
PREV_LOSS = 22
PREV_NORM = 23
LOSS_SEEN = 24  # 1 when PREV_LOSS is the loss of the step before
ERROR = 25  # e of the PD control, one step old
LR_SCALE = 26  # s: the controller's multiplier of LR
META_BETA2 = 27  # beta2 of the slow loop, before the phase lowers it
OUTLIERS = 28  # consecutive outlier steps (GUARD)
WARNINGS = 29  # early warnings at WARNING_LEVEL so far
COOLDOWN = 30  # steps until the early warning may act again
TREND = 31  # meta3: tanh z of paper eq 9 in a call in which the slow loop is due, 0 in the others
FAST_HISTORY = 32  # the last 14 values of v_fast before correction, newest first
FAST_HISTORY_LEN = 14
META_HISTORY = 46  # the last 50 values of v_fast after correction, newest first
META_HISTORY_LEN = 50

# -- outputs ------------------------------------------------------------------
OUTPUTS = 96
LR_OUT = 96  # eta_final
BETA1_OUT = 97
BETA2_OUT = 98
CLIP_THRESHOLD = 99  # of the global L2 norm; inf where the law does not clip
CLIP_COEF = 100  # min(1, CLIP_THRESHOLD / (norm + CLIP_EPS))
SKIP = 101  # 1: this step changes nothing
PHASE = 102
GRAD_NORM = 103  # L2, after unscaling, before clipping
GAMMA_NORM = 104  # sigma (paper eq 1), after unscaling
MAX_GRAD = 105
NONFINITE = 106  # non-finite gradient elements in this step
WARNING = 107  # W, the early-warning level
BIAS_CORRECTION1 = 108  # 1 - beta1^t
BIAS_CORRECTION2_SQRT = 109  # sqrt(1 - beta2^t)
LOSS = 110  # the loss that was given, NaN without one
GRAD_FACTOR = 111  # takes a stored gradient to the g of the update: CLIP_COEF / grad_scale, negative to ascend
NUM_SLOTS = 112

# -- gradient telemetry, shape (4,) or (num_tensors, 4) ----------------------------------------------------
SUM_POW = 0  # sum |g|^gamma over finite elements
SUM_SQ = 1  # sum g^2 over finite elements
MAX_ABS = 2  # max |g| over finite elements
COUNT_NONFINITE = 3
NUM_TELEMETRY = 4

# -- history of a tensor's gradient norms, shape (num_tensors, 2): the smallest in the warm-up, then an average ---
HISTORY_NORM = 0  # of the clipped gradient, after unscaling
HISTORY_SEEN = 1  # norms that it has seen, counted up to TENSOR_CLIP_WARMUP
NUM_HISTORY = 2

# -- judgement of gradients (laws/judge.py), shape (JUDGE_REPORT + JUDGE_HEAD + 3 (tensors + 1),) ------------------
JUDGE_FOUND = 0  # 1 to skip the step, else 0: as a loss scaler's found_inf
JUDGE_APPLY = 4  # what the gradients have to be divided by: the loss scale, over the factor of the norm of all
JUDGE_REPORT = 8  # here a head begins, then the norms (tensors + 1, the last is that of all) and their scores; behind
# the report, the logarithms of what brings each norm to its limit, 0 where it is below
JUDGE_SKIP = 0  # numbers of the head
JUDGE_LOSS = 1
JUDGE_FOUND_INF = 2
JUDGE_SCALE = 3
JUDGE_CLIPPED = 4  # norms above their limit
JUDGE_NORM = 5
JUDGE_SCORE = 6
JUDGE_RATIO = 7  # left for the size of the update, which is known after the step
JUDGE_HEAD = 8

# -- layer-wise control (BLADE): averages of a layer, shape (layers, 2), and of all layers, shape (3,). 0: none yet ---
LAYER_NORM = 0  # of the layer's gradient, after unscaling, before clipping
LAYER_ALIGNMENT = 1  # of 1 + a
NUM_LAYER = 2
SHARED_LOSS = 0
SHARED_ENTROPY = 1
SHARED_STEPS = 2  # steps that were not skipped
NUM_SHARED = 3
# Columns of BLADE's table of tensors: where the address of the gradient stands, its first element's number in its
# layer, its elements, and the bytes of one. Draws of a refresh: two new samples, and which ones they replace.
LAYER_CELL, LAYER_START, LAYER_NUMEL, LAYER_WIDTH = 0, 1, 2, 3
LAYER_COLUMNS = 4
DRAW_NEW_1, DRAW_NEW_2, DRAW_PLACE_1, DRAW_PLACE_2 = 0, 1, 2, 3
NUM_DRAWS = 4

# -- the laws ------------------------------------------------------------------
STABILITY_V1 = 1
STABILITY_V2 = 2
META3 = 3
LAWS = {"stability_v1": STABILITY_V1, "stability_v2": STABILITY_V2, "meta3": META3}

EPS_RATIO = 1e-8  # the epsilon of every ratio in the laws
ALPHA_FAST = 0.9  # paper eq 2 (value: SDK)
ALPHA_SLOW = 0.999  # paper eq 3 (value: SDK)
ALPHA_CURVATURE = 0.95  # paper eq 5 (value: SDK)
PHASE_THROTTLE = 0.5  # paper eq 7
PHASE_BETA2 = 0.3  # meta3: beta2 (1 - .3 phi) (SDK)
KP = 0.05  # PD control (SDK)
KD = 0.02
V1_TAU = 0.1
V2_TEMPERATURE_UP = 0.15
V2_TEMPERATURE_DOWN = 0.08
V2_TEMPERATURE_EQUAL = 0.1
BETA2_GAIN = 0.15
BETA1_GAIN = 0.15
BETA1_CENTER = 0.01
BETA1_WIDTH = 0.05
V1_BETA1 = 0.9
V1_PHASE_HIGH = 0.55
V1_PHASE_LOW = 0.45
V1_DECAY = 0.3
V1_RECOVERY = 0.2
V2_PHASE_HIGH = 0.55
V2_PHASE_LOW = 0.50
V2_DECAY = 0.15
V2_RECOVERY = 0.08
V2_PHASE_CURVATURE = 0.1
V2_BETA1_MIN, V2_BETA1_MAX = 0.85, 0.95
V2_BETA2_MIN, V2_BETA2_MAX = 0.9, 0.9999
META_BETA2_MIN, META_BETA2_MAX = 0.9, 0.99999
META_EPS = 1e-6  # epsilon of paper eq 9 (value: SDK)
HISTORY_DECAY = 5.0  # history correction: weights exp(-k/5)
HISTORY_GAIN = 0.2
CLIP_BASE = 1.0  # predictive clipping: CLIP_BASE (1 + CLIP_GAIN sqrt(v_fast / v_slow))
CLIP_GAIN = 0.5
CLIP_EPS = 1e-6
# Clipping of a tensor against its own history (AdaGC, arXiv 2502.11034; values: there, but the warm-up, which is 100).
TENSOR_CLIP_NORM = 1.0  # limit of the global norm while a tensor warms up
TENSOR_CLIP_RATIO = 1.05  # limit of a tensor's norm afterwards, in units of its history
TENSOR_CLIP_BETA = 0.98  # memory of the history
TENSOR_CLIP_WARMUP = 30  # norms of a tensor, not steps of the optimizer
# Judgement of gradients. A deviation is at least JUDGE_FLOOR + JUDGE_YOUNG / n (in logarithms): the second step of a
# run is an outlier only at thousands of times the first, the tenth at more than 10 times the others.
JUDGE_NORMAL = math.sqrt(math.pi / 2)  # standard over mean absolute deviation of a normal distribution
JUDGE_FLOOR, JUDGE_YOUNG = 0.2, 2.0
JUDGE_WINSOR = 3.0  # what an accepted value moves a history by at most, in deviations
# Layer-wise control (values: the BLADE manuscript, which has no public address; docs/laws.md has what it says).
BLADE_SAMPLES = 16  # sign bits per layer
BLADE_BETA = 0.98
BLADE_MIN, BLADE_MAX = 0.3, 1.7
BLADE_REFRESH = 100  # steps after which two of the samples are replaced
BLADE_SEED = 13  # indices_seed
BLADE_SCORE_MAX = 1e18  # keeps products of two scores finite; multipliers end long before
WARN_SURGE, WARN_SURGE_RATIO = 0.5, 2.5
WARN_CURVATURE, WARN_CURVATURE_LEVEL = 0.2, 0.1
WARNING_LEVEL = 0.7
EMERGENCY_SCALE = 0.5
EMERGENCY_BETA2 = 0.01
# Ours (GUARD): a step whose sigma is more than OUTLIER_RATIO times the bias-corrected v_fast leaves the
# statistics alone, unless OUTLIER_PATIENCE steps in a row say the same: then it is the new level.
OUTLIER_RATIO = 4.0
OUTLIER_PATIENCE = 5
# Ours (GUARD): the published recursion of stability_v2's multiplier s has no rest point (each step multiplies it), so
# it drifts to a bound whatever the gradients do. Each step first takes this share of the way back to 1, the memory of
# the fast average; then s stays between 0.59 (phase 1) and 1.73 (phase 0), and at 1 where nothing changes.
V2_RELAXATION = 1 - ALPHA_FAST
SDK_LR_MIN, SDK_LR_MAX = 1e-7, 1e-2

# Triton's cache of compiled kernels does not see numbers that a kernel reads from a module; this argument shows it.
KEY = hashlib.sha256(repr(sorted((k, v) for k, v in globals().items() if k.isupper())).encode()).hexdigest()
