// The step's large loops for CPUs, compiled on first use (native.py): telemetry, Lion and AdamW.
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

// fp16 by its bits and without a branch: compilers do not vectorise their own conversion everywhere.
float fp16_to_float(uint16_t bits) {
    uint32_t magnitude = bits & 0x7FFF;
    // As an fp32 of the same fields the value is 2^112 too small, whether it is normal or not.
    uint32_t value = as_bits(as_float(magnitude << 13) * 0x1p112f);
    uint32_t special = 0x7F800000 | (magnitude & 0x3FF) << 13;
    return as_float(uint32_t(bits & 0x8000) << 16 | (magnitude < 0x7C00 ? value : special));
}

// Nearest fp16, ties to even.
uint16_t float_to_fp16(float value) {
    uint32_t bits = as_bits(value), magnitude = bits & 0x7FFFFFFF;
    // Adding a power of two leaves the bits that fp16 keeps, rounded to nearest even by the addition.
    uint32_t exponent = std::min<uint32_t>(std::max<uint32_t>(magnitude >> 23, 113), 143);
    float shift = as_float((exponent + 13) << 23), kept = (as_float(magnitude) + shift) - shift;
    uint32_t half = as_bits(kept * 0x1p-112f) >> 13;
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
        for (int i = 0; i < BLOCK / 2; ++i) pairs[i] = uint8_t((q[2 * i] & 15) | q[2 * i + 1] << 4);
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
void update(const Row* rows, int64_t tensors, const Values* values, const float* multipliers, int threads) {
    auto pieces = cut(rows, tensors);
    parallel(pieces.size(), threads, [&](int64_t i) {
        const Piece& piece = pieces[i];
        const Row& row = rows[piece.tensor];
        const Values& c = values[row.row];
        if (c.skip != 0) return;
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

}  // namespace

extern "C" {

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

// values: one for each control row. multipliers: float, by Row::index, or null. flags: the rule's, as rules/ has them.
void lion(const Row* rows, int64_t tensors, const Values* values, const float* multipliers, int, int threads) {
    update<Lion>(rows, tensors, values, multipliers, threads);
}

void adamw(const Row* rows, int64_t tensors, const Values* values, const float* multipliers, int flags, int threads) {
    auto run = flags & 1 ? (flags & 2 ? update<AdamW<true, true>> : update<AdamW<true, false>>)
                         : (flags & 2 ? update<AdamW<false, true>> : update<AdamW<false, false>>);
    run(rows, tensors, values, multipliers, threads);
}
}
