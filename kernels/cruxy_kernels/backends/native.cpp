// The step for CPUs, compiled on first use (native.py): telemetry, the law, Lion and AdamW.
//
// The same arithmetic as the specifications in laws/ and rules/, in one pass over memory and over many tensors at
// once. A row of the table (Row) holds the addresses of a tensor's parameter, gradient and state with their element
// types, its length, control row, position in the caller's list and number for random bits. Work is cut into chunks
// of 16,384 elements; sums are taken in 64 lanes per chunk and chunk by chunk, so that they do not depend on the
// number of threads. All arithmetic is fp32, over local arrays of 64: constant length and no aliasing, so that the
// loops vectorise; 16-bit elements and codes are converted on the way in and out.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

namespace {

constexpr int64_t CHUNK = 16384;
constexpr int64_t ALONE = 4;  // chunks that one thread does sooner than another one starts
constexpr int64_t BLOCK = 64;  // codec.py
constexpr int LANES = 64;
constexpr float K = 3.0f;  // SHARPNESS there
constexpr float LEVELS = 127.0f, LEVELS_4 = 7.0f, LEVELS_ROOT = 255.0f, TOP = 255.0f * 255.0f * 255.0f * 255.0f;

enum Type : int64_t { FP32, FP16, BF16, SOFTSIGN8, SOFTSIGN4, QUARTIC8 };  // native.py's TYPES and CODES

struct Row {
    int64_t param, grad, state[2], scales[2];
    int64_t param_type, grad_type, state_type[2], numel, row, index, id;
};

// What an update reads from a control row; filled by native.py.
struct Values {
    float skip, factor, lr, weight_decay, beta1, beta2, eps, correction1, correction2_sqrt, step, seed;
};

struct Piece {
    int64_t tensor, start, length;
};

std::vector<Piece> cut(const Row* rows, int64_t tensors) {
    std::vector<Piece> pieces;
    for (int64_t t = 0; t < tensors; ++t)
        for (int64_t start = 0; start < rows[t].numel; start += CHUNK)
            pieces.push_back({t, start, std::min(CHUNK, rows[t].numel - start)});
    return pieces;
}

template <class Work>
void parallel(int64_t count, int threads, Work work) {
    std::atomic<int64_t> next{0};
    auto run = [&] {
        for (int64_t i = next++; i < count; i = next++) work(i);
    };
    std::vector<std::thread> others;
    for (int t = 1; t < std::min<int64_t>(threads, count / ALONE); ++t) others.emplace_back(run);
    run();
    for (auto& other : others) other.join();
}

template <class T>
T* at(int64_t address) {
    return reinterpret_cast<T*>(address);
}

float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

float bf16_to_float(uint16_t bits) { return as_float(uint32_t(bits) << 16); }

// Nearest bfloat16, ties to even. SATURATE: a finite value stays finite.
template <bool SATURATE>
uint16_t float_to_bf16(float value) {
    uint32_t bits = as_bits(value), magnitude = bits & 0x7FFFFFFF, sign = (bits >> 16) & 0x8000;
    uint32_t nearest = (magnitude + 0x7FFF + ((magnitude >> 16) & 1)) >> 16;
    if (SATURATE) nearest = std::min<uint32_t>(nearest, 0x7F7F);
    uint32_t special = (magnitude >> 16) | (magnitude > 0x7F800000 ? 0x40 : 0);
    return uint16_t(sign | (magnitude < 0x7F800000 ? nearest : special));
}

// fp16 by its bits and without a branch: compilers do not vectorise their own conversion everywhere. No fp32 in
// between is subnormal: many processors are slow with those.
float fp16_to_float(uint16_t bits) {
    uint32_t magnitude = bits & 0x7FFF, normal = (magnitude << 13) + (112u << 23);
    // With one exponent more a subnormal has a leading one, 2^-14, which is taken off again.
    uint32_t subnormal = as_bits(as_float(normal + (1u << 23)) - 0x1p-14f);
    uint32_t special = 0x7F800000 | (magnitude & 0x3FF) << 13;
    uint32_t value = magnitude < 0x400 ? subnormal : normal;
    return as_float(uint32_t(bits & 0x8000) << 16 | (magnitude < 0x7C00 ? value : special));
}

// Nearest fp16, ties to even.
uint16_t float_to_fp16(float value) {
    uint32_t bits = as_bits(value), magnitude = bits & 0x7FFFFFFF;
    // Adding a power of two leaves the bits that fp16 keeps, rounded to nearest even by the addition.
    uint32_t exponent = std::min<uint32_t>(std::max<uint32_t>(magnitude >> 23, 113), 143);
    float shift = as_float((exponent + 13) << 23), kept = (as_float(magnitude) + shift) - shift;
    uint32_t normal = (as_bits(kept) >> 13) - (112u << 10), subnormal = as_bits(kept + 0.5f) - as_bits(0.5f);
    uint32_t half = kept < 0x1p-14f ? subnormal : normal;
    half = magnitude >= 0x477FF000 ? 0x7C00 : half;  // 65520 and beyond round to infinity
    half = magnitude > 0x7F800000 ? 0x7E00 : half;
    return uint16_t(bits >> 16 & 0x8000) | uint16_t(half);
}

// Codes of either width, a byte each here, and the values that they stand for.
void decode(const int8_t* q, float levels, float scale, float* m) {
    for (int i = 0; i < BLOCK; ++i) {
        float code = float(int32_t(q[i]));
        m[i] = code / (levels * (1 + K) - K * std::fabs(code)) * scale;
    }
}

// The bits of a block's scale, and the scale where it can divide, else 0.
uint16_t block_scale(const float* m, float& scale) {
    int32_t bits[BLOCK], largest = 0;
    std::memcpy(bits, m, sizeof bits);
    // The largest bits are the largest magnitude, and NaN is above all.
    for (int i = 0; i < BLOCK; ++i) largest = std::max(largest, bits[i] & 0x7FFFFFFF);
    float absmax;
    std::memcpy(&absmax, &largest, 4);
    uint16_t scale_bits = float_to_bf16<true>(absmax);
    scale = largest >= 0x7F800000 ? 0.0f : bf16_to_float(scale_bits);
    return scale_bits;
}

float threshold(uint32_t random) { return float((random >> 16) + 1) * 0x1p-16f; }

// random: null for codes that are rounded to the nearest one.
uint16_t encode(const float* m, float levels, const uint32_t* random, int8_t* q) {
    float scale;
    uint16_t scale_bits = block_scale(m, scale);
    if (scale == 0) {
        std::memset(q, 0, BLOCK);
        return scale_bits;
    }
    const float base = scale * 0.125f;
    int32_t level[BLOCK];
    for (int i = 0; i < BLOCK; ++i) {
        float a = std::fabs(m[i]);
        float x = a / (base + a * (0.125f * K)) * (0.125f * (1 + K) * levels);
        if (random) {
            float low = float(int32_t(x < levels - 1 ? x : levels - 1)), full = levels * (1 + K);
            float chance = (x - low) * (full - K - K * low);
            level[i] = int32_t(low) + (chance > threshold(random[i]) * (full - K * x));
        } else {
            x += 0.5f;
            level[i] = int32_t(x < levels ? x : levels);
        }
    }
    for (int i = 0; i < BLOCK; ++i) q[i] = int8_t(m[i] < 0 ? -level[i] : level[i]);
    return scale_bits;
}

uint16_t encode_quartic(const float* v, const uint32_t* random, uint8_t* q) {
    float scale;
    uint16_t scale_bits = block_scale(v, scale);
    for (int i = 0; i < BLOCK; ++i) {
        float part = v[i] / scale, x = std::sqrt(std::sqrt(part)) * LEVELS_ROOT;
        float low = float(int32_t(x < LEVELS_ROOT - 1 ? x : LEVELS_ROOT - 1)), square = low * low;
        float chance = part * TOP - square * square;
        float whole = (2 * low + 1) * (2 * square + 2 * low + 1);
        int32_t level = int32_t(low) + (chance > threshold(random[i]) * whole);
        q[i] = uint8_t(scale > 0 && v[i] > 0 ? std::max(level, 1) : 0);
    }
    return scale_bits;
}

// n elements of `type` at `address` (and of its scales) as fp32; zeros behind them.
void load(int64_t type, int64_t address, int64_t scales, int64_t start, int64_t n, float* out) {
    if (type == FP32) {
        if (n < BLOCK) std::memset(out, 0, BLOCK * sizeof(float));
        std::memcpy(out, at<const float>(address) + start, n * sizeof(float));
        return;
    }
    if (type == SOFTSIGN8) {
        int8_t q[BLOCK] = {};
        std::memcpy(q, at<const int8_t>(address) + start, n);
        decode(q, LEVELS, bf16_to_float(at<const uint16_t>(scales)[start / BLOCK]), out);
        return;
    }
    if (type == SOFTSIGN4) {
        uint8_t pairs[BLOCK / 2] = {};
        int8_t q[BLOCK];
        std::memcpy(pairs, at<const uint8_t>(address) + start / 2, (n + 1) / 2);
        for (int i = 0; i < BLOCK / 2; ++i) {
            q[2 * i] = int8_t(int32_t(uint32_t(pairs[i]) << 28) >> 28);
            q[2 * i + 1] = int8_t(int32_t(uint32_t(pairs[i]) << 24) >> 28);
        }
        decode(q, LEVELS_4, bf16_to_float(at<const uint16_t>(scales)[start / BLOCK]), out);
        return;
    }
    if (type == QUARTIC8) {
        uint8_t q[BLOCK] = {};
        std::memcpy(q, at<const uint8_t>(address) + start, n);
        const float scale = bf16_to_float(at<const uint16_t>(scales)[start / BLOCK]);
        for (int i = 0; i < BLOCK; ++i) {
            float code = float(int32_t(q[i])), square = code * code;
            out[i] = square * square * (1 / TOP) * scale;
        }
        return;
    }
    uint16_t bits[BLOCK] = {};
    std::memcpy(bits, at<const uint16_t>(address) + start, n * sizeof(uint16_t));
    if (type == BF16)
        for (int i = 0; i < BLOCK; ++i) out[i] = bf16_to_float(bits[i]);
    else
        for (int i = 0; i < BLOCK; ++i) out[i] = fp16_to_float(bits[i]);
}

// Stores what `load` loads, rounded to nearest; codes that are drawn by `random`.
void store(int64_t type, int64_t address, int64_t scales, int64_t start, int64_t n, const float* values,
           const uint32_t* random = nullptr) {
    if (type == FP32) {
        std::memcpy(at<float>(address) + start, values, n * sizeof(float));
    } else if (type == SOFTSIGN8) {
        int8_t q[BLOCK];
        at<uint16_t>(scales)[start / BLOCK] = encode(values, LEVELS, nullptr, q);
        std::memcpy(at<int8_t>(address) + start, q, n);
    } else if (type == SOFTSIGN4) {
        int8_t q[BLOCK];
        uint8_t pairs[BLOCK / 2];
        at<uint16_t>(scales)[start / BLOCK] = encode(values, LEVELS_4, random, q);
        for (int i = 0; i < BLOCK / 2; ++i) pairs[i] = uint8_t((q[2 * i] & 15) | (q[2 * i + 1] & 15) << 4);
        std::memcpy(at<uint8_t>(address) + start / 2, pairs, (n + 1) / 2);
    } else if (type == QUARTIC8) {
        uint8_t q[BLOCK];
        at<uint16_t>(scales)[start / BLOCK] = encode_quartic(values, random, q);
        std::memcpy(at<uint8_t>(address) + start, q, n);
    } else {
        uint16_t bits[BLOCK];
        if (type == BF16)
            for (int i = 0; i < BLOCK; ++i) bits[i] = float_to_bf16<false>(values[i]);
        else
            for (int i = 0; i < BLOCK; ++i) bits[i] = float_to_fp16(values[i]);
        std::memcpy(at<uint16_t>(address) + start, bits, n * sizeof(uint16_t));
    }
}

uint32_t hash32(uint32_t x) {  // rounding.py
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

// The bits of a block (rounding.py): the lower ones round the parameters, the upper ones codes.
void random_bits(const Row& row, const Values& c, int64_t start, uint32_t* random) {
    uint32_t key = hash32(uint32_t(row.id) + hash32(uint32_t(c.seed)));
    key = hash32(uint32_t(int64_t(c.step)) * 0x9E3779B9u + key);
    // A block of 64 starts at a multiple of 64, so that its elements share the upper half of their index.
    const uint32_t high = hash32(key + uint32_t(uint64_t(start) >> 32)), low = uint32_t(start);
    for (uint32_t i = 0; i < BLOCK; ++i) random[i] = hash32((low + i) ^ high);
}

// Stores parameters: fp32 as they are, 16 bits rounded stochastically (rounding.py, bit for bit).
void store_param(const Row& row, int64_t start, int64_t n, const float* values, const uint32_t* random) {
    if (row.param_type == FP32) return store(FP32, row.param, 0, start, n, values);
    uint16_t out[BLOCK];
    const bool bf16 = row.param_type == BF16;
    if (bf16) {
        for (int i = 0; i < BLOCK; ++i) {
            uint32_t bits = as_bits(values[i]), magnitude = bits & 0x7FFFFFFF;
            uint32_t rounded = std::min<uint32_t>((magnitude + (random[i] & 0xFFFF)) >> 16, 0x7F7F);
            uint32_t special = (magnitude >> 16) | (magnitude > 0x7F800000 ? 0x40 : 0);
            out[i] = uint16_t((magnitude < 0x7F800000 ? rounded : special) | (bits >> 16 & 0x8000));
        }
    } else {
        float kept[BLOCK];
        for (int i = 0; i < BLOCK; ++i) {
            float a = std::fabs(values[i]), offset = a < 0x1p-14f ? 0x1p-14f : 0.0f;
            float up = as_float((as_bits(a + offset) + (random[i] & 0x1FFF)) & 0xFFFFE000u) - offset;
            up = up < 65504.0f ? up : 65504.0f;
            up = a <= std::numeric_limits<float>::max() ? up : a;
            kept[i] = as_float(as_bits(up) | (as_bits(values[i]) & 0x80000000u));
        }
        for (int i = 0; i < BLOCK; ++i) out[i] = float_to_fp16(kept[i]);
    }
    std::memcpy(at<uint16_t>(row.param) + start, out, n * sizeof(uint16_t));
}

struct Lion {
    static constexpr int STATES = 1;
    static void block(const Values& c, float multiplier, float* p, const float* g, float* m, float*) {
        // Copies: through the reference the compiler has to expect that a store changes them.
        const float beta1 = c.beta1, beta2 = c.beta2, factor = c.factor, keep = 1 - c.lr * c.weight_decay;
        const float one_beta1 = 1 - beta1, one_beta2 = 1 - beta2, lr = c.lr * multiplier;
        for (int i = 0; i < BLOCK; ++i) {
            float gi = g[i] * factor, u = beta1 * m[i] + one_beta1 * gi;
            float step = u > 0 ? lr : 0.0f;
            step = u < 0 ? -lr : step;
            p[i] = p[i] * keep - step;
            m[i] = beta2 * m[i] + one_beta2 * gi;
        }
    }
};

template <bool NESTEROV, bool DECOUPLED>
struct AdamW {
    static constexpr int STATES = 2;
    static void block(const Values& c, float multiplier, float* p, const float* g, float* m, float* v) {
        const float keep = DECOUPLED ? 1 - c.lr * c.weight_decay : 1.0f, l2 = DECOUPLED ? 0.0f : c.weight_decay;
        const float beta1 = c.beta1, beta2 = c.beta2, factor = c.factor, eps = c.eps;
        const float one_beta1 = 1 - beta1, one_beta2 = 1 - beta2;
        const float step = c.lr * c.correction2_sqrt / c.correction1 * multiplier;
        for (int i = 0; i < BLOCK; ++i) {
            float gi = DECOUPLED ? g[i] * factor : g[i] * factor + l2 * p[i];
            m[i] = beta1 * m[i] + one_beta1 * gi;
            v[i] = beta2 * v[i] + one_beta2 * gi * gi;
            float n = NESTEROV ? beta1 * m[i] + one_beta1 * gi : m[i];
            p[i] = p[i] * keep - step * (n / (std::sqrt(v[i]) + eps));
        }
    }
};

template <class Rule>
void update(const Row* rows, int64_t tensors, const Values* values, const float* multipliers, const float* factors,
            int threads) {
    auto pieces = cut(rows, tensors);
    parallel(pieces.size(), threads, [&](int64_t i) {
        const Piece& piece = pieces[i];
        const Row& row = rows[piece.tensor];
        Values c = values[row.row];
        if (c.skip != 0) return;
        if (factors) c.factor *= factors[row.index];
        const float multiplier = multipliers ? multipliers[row.index] : 1.0f;
        float p[BLOCK], g[BLOCK], state[2][BLOCK];
        uint32_t random[BLOCK];
        const bool draws = row.param_type != FP32 || row.state_type[0] == SOFTSIGN4 || row.state_type[1] == QUARTIC8;
        for (int64_t k = 0; k < piece.length; k += BLOCK) {
            const int64_t start = piece.start + k, n = std::min(BLOCK, piece.length - k);
            load(row.param_type, row.param, 0, start, n, p);
            load(row.grad_type, row.grad, 0, start, n, g);
            for (int s = 0; s < Rule::STATES; ++s)
                load(row.state_type[s], row.state[s], row.scales[s], start, n, state[s]);
            Rule::block(c, multiplier, p, g, state[0], state[1]);
            if (draws) random_bits(row, c, start, random);
            store_param(row, start, n, p, random);
            for (int s = 0; s < Rule::STATES; ++s)
                store(row.state_type[s], row.state[s], row.scales[s], start, n, state[s], random);
        }
    });
}

template <int POWER>  // 3: gamma = 1.5; 4: gamma = 2; 0: any
void statistics(const Row& row, const Piece& piece, float gamma, float* out) {
    float power[LANES] = {}, square[LANES] = {}, largest[LANES] = {}, bad[LANES] = {};
    for (int64_t i = 0; i < piece.length; i += LANES) {
        float values[LANES];
        load(row.grad_type, row.grad, 0, piece.start + i, std::min<int64_t>(LANES, piece.length - i), values);
        for (int j = 0; j < LANES; ++j) {
            float a = std::fabs(values[j]);
            bool finite = a <= std::numeric_limits<float>::max();
            bad[j] += finite ? 0.0f : 1.0f;
            a = finite ? a : 0.0f;
            largest[j] = a > largest[j] ? a : largest[j];
            square[j] += a * a;
            power[j] += POWER == 3 ? a * std::sqrt(a) : POWER == 4 ? a * a : std::pow(a, gamma);
        }
    }
    for (int j = 0; j < LANES; ++j) {
        out[0] += power[j];
        out[1] += square[j];
        out[2] = std::max(out[2], largest[j]);
        out[3] += bad[j];
    }
}

// -- the law (laws/control.py) -------------------------------------------------------------------------------------
// native.py puts laws/layout.py's numbers before this file, as namespace L.

// As torch does it: NaN stays NaN.
float clamp(float value, float low, float high) {
    value = value < low ? low : value;
    return value > high ? high : value;
}

// torch.lerp for weights of at least one half: a share `keep` of the old value stays.
float ema(float value, float old, float keep) { return old - (old - value) * (1 - keep); }

float one_minus_power(float beta, float t) { return -std::expm1(t * std::log(beta)); }

struct Statistics {
    float sum_pow, sum_sq, max_abs, nonfinite, norm, inverse;
    const float* loss;  // null: none was given
};

void row_law(float* slot, const Statistics& s, int law, bool clip_global) {
    const float INFINITE = std::numeric_limits<float>::infinity();
    const float sum_pow = s.sum_pow * (s.inverse == 1 ? 1.0f : std::pow(s.inverse, slot[L::GAMMA]));
    const float step = slot[L::STEP] + 1, age = slot[L::AGE] + 1, lr = slot[L::LR];
    const bool guard = slot[L::GUARD] > 0, v1 = law == L::STABILITY_V1;

    const float gamma_norm = std::pow(sum_pow, 1 / slot[L::GAMMA]);
    float sigma = v1 ? s.sum_sq : gamma_norm;
    const float level = slot[L::V_FAST] / (1 - std::pow(L::ALPHA_FAST, slot[L::STEP]));
    const float limit = v1 ? L::OUTLIER_RATIO * L::OUTLIER_RATIO : L::OUTLIER_RATIO;
    const bool outlier = guard && sigma > limit * level && level > 0;
    const float outliers = outlier ? slot[L::OUTLIERS] + 1 : 0.0f;
    if (outlier && outliers <= L::OUTLIER_PATIENCE) sigma = level;

    float v_fast = ema(sigma, slot[L::V_FAST], L::ALPHA_FAST);
    const float v_slow = ema(sigma, slot[L::V_SLOW], L::ALPHA_SLOW);
    float* fast = slot + L::FAST_HISTORY;
    std::memmove(fast + 1, fast, (L::FAST_HISTORY_LEN - 1) * sizeof(float));
    fast[0] = v_fast;
    if (!v1) {
        float weighted = 0, weights = 0;
        for (int k = 0; k < L::FAST_HISTORY_LEN; ++k) {
            float weight = float(k) < step ? std::exp(-float(k) / L::HISTORY_DECAY) : 0.0f;
            weighted += weight * fast[k];
            weights += weight;
        }
        v_fast = v_fast + L::HISTORY_GAIN * (weighted / weights - v_fast);
    }
    float* meta = slot + L::META_HISTORY;
    std::memmove(meta + 1, meta, (L::META_HISTORY_LEN - 1) * sizeof(float));
    meta[0] = v_fast;

    float curvature = slot[L::CURVATURE];
    if (s.loss && slot[L::LOSS_SEEN] > 0)
        curvature = ema((*s.loss - slot[L::PREV_LOSS]) / (slot[L::PREV_NORM] + L::EPS_RATIO), curvature,
                        L::ALPHA_CURVATURE);

    float phase = v_fast / (v_fast + v_slow + L::EPS_RATIO);
    const float error = v_fast - v_slow, pd = L::KP * error + L::KD * (error - slot[L::ERROR]);
    float scale = slot[L::LR_SCALE], cooldown = slot[L::COOLDOWN], trend = 0, warning = 0, warnings = slot[L::WARNINGS];
    float lr_out, beta1_out, beta2_out, threshold;
    if (v1) {
        float throttle = phase > L::V1_PHASE_HIGH ? 1 - L::V1_DECAY * phase : 1.0f;
        throttle = phase < L::V1_PHASE_LOW ? 1 + L::V1_RECOVERY * (1 - phase) : throttle;
        lr_out = lr * throttle;
        beta1_out = L::V1_BETA1;
        beta2_out = slot[L::BETA2] * (1 + L::BETA2_GAIN * std::tanh(pd / L::V1_TAU));
        beta2_out = clamp(beta2_out, L::V2_BETA2_MIN, L::V2_BETA2_MAX);
        threshold = INFINITE;
    } else {
        beta1_out = slot[L::BETA1] * (1 + L::BETA1_GAIN * std::tanh((curvature - L::BETA1_CENTER) / L::BETA1_WIDTH));
        beta1_out = clamp(beta1_out, L::V2_BETA1_MIN, L::V2_BETA1_MAX);
        threshold = L::CLIP_BASE * (1 + L::CLIP_GAIN * std::sqrt(v_fast / (v_slow + L::EPS_RATIO)));
        const float ratio = v_fast / (1 - std::pow(L::ALPHA_FAST, step)) /
                            (v_slow / (1 - std::pow(L::ALPHA_SLOW, step)) + L::EPS_RATIO);
        warning = (ratio > L::WARN_SURGE_RATIO ? L::WARN_SURGE : 0.0f) +
                  (std::fabs(curvature) > L::WARN_CURVATURE_LEVEL ? L::WARN_CURVATURE : 0.0f);
        const bool alarm = warning >= L::WARNING_LEVEL - 1e-6f;
        warnings += alarm;
        if (law == L::STABILITY_V2) {
            phase = phase * (1 + L::V2_PHASE_CURVATURE * std::tanh(curvature));
            const float temperature = error > 0   ? L::V2_TEMPERATURE_UP
                                      : error < 0 ? L::V2_TEMPERATURE_DOWN
                                                  : L::V2_TEMPERATURE_EQUAL;
            beta2_out = slot[L::BETA2] * (1 + L::BETA2_GAIN * std::tanh(pd / temperature));
            beta2_out = clamp(beta2_out, L::V2_BETA2_MIN, L::V2_BETA2_MAX);
            scale = scale + (guard ? L::V2_RELAXATION : 0.0f) * (1 - scale);
            if (phase > L::V2_PHASE_HIGH) scale *= std::exp(-L::V2_DECAY * (phase - L::V2_PHASE_HIGH));
            if (phase < L::V2_PHASE_LOW) scale *= 1 + L::V2_RECOVERY * (L::V2_PHASE_HIGH - phase);
            const bool emergency = alarm && guard && slot[L::SCALE_MAX] < INFINITE && cooldown <= 0;
            if (emergency) {
                scale *= L::EMERGENCY_SCALE;
                beta2_out = std::min(beta2_out + L::EMERGENCY_BETA2, L::V2_BETA2_MAX);
            }
            cooldown = emergency ? slot[L::META_INTERVAL] : std::max(cooldown - 1, 0.0f);
            scale = clamp(scale, slot[L::SCALE_MIN], slot[L::SCALE_MAX]);
            lr_out = lr * scale;
        } else {
            lr_out = lr * scale * (1 - L::PHASE_THROTTLE * phase);
            lr_out = lr > 0 ? clamp(lr_out, slot[L::LR_MIN], slot[L::LR_MAX]) : lr_out;
            beta2_out = clamp(slot[L::META_BETA2] * (1 - L::PHASE_BETA2 * phase), L::META_BETA2_MIN, L::META_BETA2_MAX);
            float sum = 0;
            for (int k = 0; k < L::META_HISTORY_LEN; ++k) sum += meta[k];
            const float reference = sum / std::min(step, float(L::META_HISTORY_LEN));
            const bool due = std::fmod(step + slot[L::SKIPPED], slot[L::META_INTERVAL]) == 0 && step >= 2;
            trend = due ? std::tanh((v_fast - reference) / (reference + L::META_EPS)) : 0.0f;
        }
    }
    if (!clip_global) threshold = INFINITE;
    const float clip = clamp(threshold / (s.norm + L::CLIP_EPS), -INFINITE, 1);

    slot[L::STEP] = step;
    slot[L::AGE] = age;
    slot[L::V_FAST] = v_fast;
    slot[L::V_SLOW] = v_slow;
    slot[L::CURVATURE] = curvature;
    slot[L::PREV_LOSS] = s.loss ? *s.loss : slot[L::PREV_LOSS];
    slot[L::PREV_NORM] = s.norm;
    slot[L::LOSS_SEEN] = s.loss != nullptr;
    slot[L::ERROR] = error;
    slot[L::LR_SCALE] = scale;
    slot[L::OUTLIERS] = outliers;
    slot[L::WARNINGS] = warnings;
    slot[L::COOLDOWN] = cooldown;
    slot[L::TREND] = trend;
    slot[L::LR_OUT] = lr_out;
    slot[L::BETA1_OUT] = beta1_out;
    slot[L::BETA2_OUT] = beta2_out;
    slot[L::CLIP_THRESHOLD] = threshold;
    slot[L::CLIP_COEF] = clip;
    slot[L::PHASE] = phase;
    slot[L::GAMMA_NORM] = gamma_norm;
    slot[L::MAX_GRAD] = s.max_abs;
    slot[L::WARNING] = warning;
    slot[L::BIAS_CORRECTION1] = one_minus_power(beta1_out, age);
    slot[L::BIAS_CORRECTION2_SQRT] = std::sqrt(one_minus_power(beta2_out, age));
    slot[L::LOSS] = s.loss ? *s.loss : std::numeric_limits<float>::quiet_NaN();
    slot[L::GRAD_FACTOR] = clip * ((1 - 2 * slot[L::MAXIMIZE]) * s.inverse);
}

// -- judgement of gradients (laws/judge.py) ------------------------------------------------------------------------

float sum_of_squares(const Row& row, const Piece& piece) {
    float square[LANES] = {}, total = 0;
    for (int64_t i = 0; i < piece.length; i += LANES) {
        float values[LANES];
        load(row.grad_type, row.grad, 0, piece.start + i, std::min<int64_t>(LANES, piece.length - i), values);
        for (int j = 0; j < LANES; ++j) square[j] += values[j] * values[j];
    }
    for (int j = 0; j < LANES; ++j) total += square[j];
    return total;
}

// laws/judge.py's Limits, and the deviations at which this step is clipped; filled by native.py.
struct Limits {
    float sigmas, far, skip, least_rate, patience, log_ratio;
};

// A norm beside its history: mean and mean absolute deviation of its logarithm, values taken in, outliers in a row.
struct Compared {
    float log, sigma, score, above;
    bool finite;
    float &mean, &deviation, &count, &streak;

    Compared(float norm, float* state, int64_t width, const Limits& l, bool has_ratio)
        : mean(state[0]), deviation(state[width]), count(state[2 * width]), streak(state[3 * width]) {
        log = std::log(norm);
        finite = std::fabs(log) <= std::numeric_limits<float>::max();
        sigma = std::max(L::JUDGE_NORMAL * deviation, L::JUDGE_YOUNG / std::max(count, 1e-6f) + L::JUDGE_FLOOR);
        const float delta = finite ? log - mean : 0.0f;
        score = delta / sigma;
        float limit = sigma * l.sigmas * (score > l.far ? l.far / score : 1.0f);
        if (has_ratio && count > 0) limit = std::min(limit, l.log_ratio);
        above = std::min(limit - delta, 0.0f);
    }

    void learn(bool good, const Limits& l) {
        const bool outlier = score > l.sigmas;
        const bool start = ((outlier && streak >= l.patience - 1) || count == 0) && finite;
        const float accept = finite && !outlier && good ? 1.0f : 0.0f;
        const float rate = std::max(1 / (count + 1), l.least_rate) * accept;
        const float move = clamp(score, -L::JUDGE_WINSOR, L::JUDGE_WINSOR) * sigma;
        deviation = start ? 0.0f : deviation + rate * (std::fabs(move) - deviation);
        mean = start ? log : mean + rate * move;
        count = start ? 1.0f : count + accept;
        streak = outlier ? streak + 1 : 0.0f;
    }
};

}  // namespace

extern "C" {

// rows: of the tensors that have a gradient, Row::index their places among all `tensors`; or norms: float (tensors,).
// state: float (4, tensors + 1). out: float, as layout.py has it. loss, grad_scale, found_inf: null or one float.
// clip: 0 nothing, 1 all together, 2 each tensor too.
void judge(const Row* rows, int64_t present, const float* norms, int64_t tensors, float* state, float* out,
           const float* loss, const float* grad_scale, const float* found_inf, const Limits* limits, int clip,
           int threads) {
    const Limits& l = *limits;
    const int64_t width = tensors + 1;
    const float LARGEST = std::numeric_limits<float>::max(), NOTHING = std::numeric_limits<float>::quiet_NaN();
    float *report = out + L::JUDGE_REPORT, *own = report + L::JUDGE_HEAD, *scores = own + width, *above = scores + width;
    if (norms) {
        std::copy(norms, norms + tensors, own);
    } else {
        auto pieces = cut(rows, present);
        std::vector<float> partials(pieces.size());
        parallel(pieces.size(), threads, [&](int64_t i) {
            partials[i] = sum_of_squares(rows[pieces[i].tensor], pieces[i]);
        });
        std::vector<double> sums(tensors, 0.0);
        for (size_t i = 0; i < pieces.size(); ++i) sums[rows[pieces[i].tensor].index] += partials[i];
        for (int64_t t = 0; t < tensors; ++t) own[t] = float(std::sqrt(sums[t])) / (grad_scale ? *grad_scale : 1.0f);
    }
    double total = 0;
    for (int64_t t = 0; t < tensors; ++t) total += double(own[t] * own[t]);
    own[tensors] = std::sqrt(float(total));

    Compared whole(own[tensors], state + tensors, width, l, false);
    const bool overflow = found_inf && *found_inf > 0;
    const bool good = std::fabs(own[tensors] + (loss ? *loss : 0.0f)) <= LARGEST && whole.score <= l.skip && !overflow;
    int clipped = 0;
    for (int64_t t = 0; t < tensors; ++t) {
        Compared tensor(own[t], state + t, width, l, true);
        scores[t] = tensor.score;
        above[t] = clip == 2 ? tensor.above : 0.0f;
        clipped += above[t] < 0;
        tensor.learn(good, l);
    }
    scores[tensors] = whole.score;
    above[tensors] = clip ? whole.above : 0.0f;
    clipped += above[tensors] < 0;
    whole.learn(good, l);
    std::fill(out, report, 0.0f);
    out[L::JUDGE_FOUND] = report[L::JUDGE_SKIP] = !good;
    out[L::JUDGE_APPLY] = (grad_scale ? *grad_scale : 1.0f) * std::exp(-above[tensors]);
    report[L::JUDGE_LOSS] = loss ? *loss : NOTHING;
    report[L::JUDGE_FOUND_INF] = overflow;
    report[L::JUDGE_SCALE] = grad_scale ? *grad_scale : NOTHING;
    report[L::JUDGE_CLIPPED] = float(clipped);
    report[L::JUDGE_NORM] = own[tensors];
    report[L::JUDGE_SCORE] = whole.score;
    report[L::JUDGE_RATIO] = NOTHING;
}

// control: float (rows, L::NUM_SLOTS). telemetry: float (parts, 4). loss, found_inf, grad_scale: null or one float.
// log: null or float (log_length, L::NUM_SLOTS). law: layout.py's number of it. clip_global: whether
// the norm of all gradients together is limited.
void control_law(float* control, int64_t rows, const float* telemetry, int64_t parts, const float* loss,
                 const float* found_inf, const float* grad_scale, float* log, int64_t log_length, int law,
                 int clip_global) {
    double total[4] = {};
    for (int64_t i = 0; i < parts; ++i) {
        const float* part = telemetry + 4 * i;
        for (int k : {0, 1, 3}) total[k] += part[k];
        total[2] = std::max<double>(total[2], part[2]);
    }
    const float inverse = grad_scale ? 1 / *grad_scale : 1.0f;
    Statistics s = {float(total[0]), float(total[1]) * (inverse * inverse), float(total[2]) * inverse,
                    float(total[3]), 0, inverse, loss};
    s.norm = std::sqrt(s.sum_sq);
    const float LARGEST = std::numeric_limits<float>::max();
    bool good = !(s.nonfinite > 0) && (!loss || std::fabs(*loss) <= LARGEST) && !(found_inf && *found_inf > 0);
    for (int64_t row = 0; row < rows; ++row) {
        const float power = inverse == 1 ? 1.0f : std::pow(inverse, control[row * L::NUM_SLOTS + L::GAMMA]);
        good = good && s.sum_pow * power + s.sum_sq <= LARGEST;
    }
    for (int64_t row = 0; row < rows; ++row) {
        float* slot = control + row * L::NUM_SLOTS;
        if (good) row_law(slot, s, law, clip_global);
        slot[L::SKIPPED] += !good;
        slot[L::SKIP] = !good;
        slot[L::TREND] = good ? slot[L::TREND] : 0.0f;
        slot[L::GRAD_NORM] = s.norm;
        slot[L::NONFINITE] = s.nonfinite;
    }
    if (log && rows) {
        const int64_t turn = int64_t(control[L::STEP] + control[L::SKIPPED]) - 1;
        std::memcpy(log + (turn % log_length) * L::NUM_SLOTS, control, L::NUM_SLOTS * sizeof(float));
    }
}

// totals: float (tensors, 4) when per_tensor, else (1, 4).
void telemetry(const Row* rows, int64_t tensors, float gamma, int per_tensor, float* totals, int threads) {
    auto pieces = cut(rows, tensors);
    std::vector<float> partials(pieces.size() * 4, 0.0f);
    parallel(pieces.size(), threads, [&](int64_t i) {
        const Piece& piece = pieces[i];
        const Row& row = rows[piece.tensor];
        float* out = &partials[4 * i];
        if (gamma == 1.5f) statistics<3>(row, piece, gamma, out);
        else if (gamma == 2.0f) statistics<4>(row, piece, gamma, out);
        else statistics<0>(row, piece, gamma, out);
    });
    std::vector<double> sums(4 * (per_tensor ? tensors : 1), 0.0);
    for (size_t i = 0; i < pieces.size(); ++i) {
        double* out = &sums[per_tensor ? 4 * pieces[i].tensor : 0];
        for (int k : {0, 1, 3}) out[k] += partials[4 * i + k];
        out[2] = std::max<double>(out[2], partials[4 * i + 2]);
    }
    for (size_t i = 0; i < sums.size(); ++i) totals[i] = float(sums[i]);
}

// values: one for each control row. multipliers (of the step) and factors (of the gradient): float, by Row::index, or
// null. flags: the rule's, as rules/ has them.
void lion(const Row* rows, int64_t tensors, const Values* values, const float* multipliers, const float* factors, int,
          int threads) {
    update<Lion>(rows, tensors, values, multipliers, factors, threads);
}

void adamw(const Row* rows, int64_t tensors, const Values* values, const float* multipliers, const float* factors,
           int flags, int threads) {
    auto run = flags & 1 ? (flags & 2 ? update<AdamW<true, true>> : update<AdamW<true, false>>)
                         : (flags & 2 ? update<AdamW<false, true>> : update<AdamW<false, false>>);
    run(rows, tensors, values, multipliers, factors, threads);
}
}
