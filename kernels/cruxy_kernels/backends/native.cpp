// The step's large loops for CPUs, compiled on first use (native.py): telemetry, Lion and AdamW on fp32 tensors.
//
// The same arithmetic as the specifications in laws/ and rules/, in one pass over memory and over many tensors at once. A row of the table
// holds the addresses of parameter, gradient, exp_avg, exp_avg's scales and exp_avg_sq, the number of elements,
// the control row and the position in the caller's list. Work is cut into chunks of 16,384 elements; sums are
// taken in 64 lanes a chunk and chunk by chunk, so that they do not depend on the number of threads.

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
constexpr int64_t BLOCK = 64;  // codec.py
constexpr int LANES = 64;
constexpr float K = 3.0f, LEVELS = 127.0f;  // SHARPNESS, LEVELS there

struct Row {
    int64_t param, grad, exp_avg, scales, exp_avg_sq, numel, row, index;
};

// What an update reads from a control row; filled by native.py.
struct Values {
    float skip, factor, lr, weight_decay, beta1, beta2, eps, step_size;
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
    for (int t = 1; t < std::min<int64_t>(threads, count); ++t) others.emplace_back(run);
    run();
    for (auto& other : others) other.join();
}

template <class T>
T* at(int64_t address) {
    return reinterpret_cast<T*>(address);
}

float bf16_to_float(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// Nearest bfloat16, ties to even; a finite value stays finite.
uint16_t float_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return uint16_t(bits >> 16) | 0x40;
    if ((bits & 0x7FFFFFFF) == 0x7F800000) return uint16_t(bits >> 16);
    return std::min<uint32_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7F7F);
}

// All loops over a block run over local arrays of 64: constant length and no aliasing, so that they vectorise.

void decode(const int8_t* q, float scale, float* m) {
    for (int i = 0; i < BLOCK; ++i) {
        float code = float(int32_t(q[i]));
        m[i] = code / (LEVELS * (1 + K) - K * std::fabs(code)) * scale;
    }
}

uint16_t encode(const float* m, int8_t* q) {
    int32_t bits[BLOCK], largest = 0;
    std::memcpy(bits, m, sizeof bits);
    // The largest bits are the largest magnitude, and NaN is above all.
    for (int i = 0; i < BLOCK; ++i) largest = std::max(largest, bits[i] & 0x7FFFFFFF);
    float absmax;
    std::memcpy(&absmax, &largest, 4);
    uint16_t scale_bits = float_to_bf16(absmax);
    float scale = bf16_to_float(scale_bits);
    if (largest >= 0x7F800000 || scale == 0) {
        std::memset(q, 0, BLOCK);
        return scale_bits;
    }
    const float base = scale * 0.125f;
    int32_t level[BLOCK];
    for (int i = 0; i < BLOCK; ++i) {
        float a = std::fabs(m[i]);
        float x = a / (base + a * (0.125f * K)) * (0.125f * (1 + K) * LEVELS) + 0.5f;
        level[i] = int32_t(x < LEVELS ? x : LEVELS);
    }
    for (int i = 0; i < BLOCK; ++i) q[i] = int8_t(bits[i] < 0 ? -level[i] : level[i]);
    return scale_bits;
}

template <bool CODED>
void lion_block(const Row& row, const Values& c, float lr, int64_t start, int64_t n) {
    float* param = at<float>(row.param) + start;
    const float* grad = at<const float>(row.grad) + start;
    int8_t* codes = at<int8_t>(row.exp_avg) + start;
    float* momentum = at<float>(row.exp_avg) + start;
    uint16_t* scale = at<uint16_t>(row.scales) + start / BLOCK;
    float p[BLOCK], g[BLOCK], m[BLOCK];
    int8_t q[BLOCK];
    const bool whole = n == BLOCK;
    if (!whole) {
        std::memset(p, 0, sizeof p), std::memset(g, 0, sizeof g), std::memset(m, 0, sizeof m);
        std::memset(q, 0, sizeof q);
    }
    const int64_t floats = whole ? sizeof p : n * sizeof(float);
    std::memcpy(p, param, floats);
    std::memcpy(g, grad, floats);
    if (CODED) {
        std::memcpy(q, codes, whole ? BLOCK : n);
        decode(q, bf16_to_float(*scale), m);
    } else {
        std::memcpy(m, momentum, floats);
    }
    const float beta1 = c.beta1, beta2 = c.beta2, factor = c.factor, keep = 1 - c.lr * c.weight_decay;
    const float one_beta1 = 1 - beta1, one_beta2 = 1 - beta2;
    for (int i = 0; i < BLOCK; ++i) {
        float gi = g[i] * factor, u = beta1 * m[i] + one_beta1 * gi;
        float step = u > 0 ? lr : 0.0f;
        step = u < 0 ? -lr : step;
        p[i] = p[i] * keep - step;
        m[i] = beta2 * m[i] + one_beta2 * gi;
    }
    std::memcpy(param, p, floats);
    if (CODED) {
        *scale = encode(m, q);
        std::memcpy(codes, q, whole ? BLOCK : n);
    } else {
        std::memcpy(momentum, m, floats);
    }
}

template <bool NESTEROV, bool DECOUPLED>
void adamw_block(const Row& row, const Values& c, float step_size, int64_t start, int64_t n) {
    float* param = at<float>(row.param) + start;
    const float* grad = at<const float>(row.grad) + start;
    float* exp_avg = at<float>(row.exp_avg) + start;
    float* exp_avg_sq = at<float>(row.exp_avg_sq) + start;
    float p[BLOCK], g[BLOCK], m[BLOCK], v[BLOCK];
    const bool whole = n == BLOCK;
    if (!whole) {
        std::memset(p, 0, sizeof p), std::memset(g, 0, sizeof g), std::memset(m, 0, sizeof m);
        std::memset(v, 0, sizeof v);
    }
    const int64_t floats = whole ? sizeof p : n * sizeof(float);
    std::memcpy(p, param, floats);
    std::memcpy(g, grad, floats);
    std::memcpy(m, exp_avg, floats);
    std::memcpy(v, exp_avg_sq, floats);
    const float keep = DECOUPLED ? 1 - c.lr * c.weight_decay : 1.0f, l2 = DECOUPLED ? 0.0f : c.weight_decay;
    // Copies: through the reference the compiler has to expect that a store changes them, and does not vectorise.
    const float beta1 = c.beta1, beta2 = c.beta2, factor = c.factor, eps = c.eps;
    const float one_beta1 = 1 - beta1, one_beta2 = 1 - beta2;
    for (int i = 0; i < BLOCK; ++i) {
        float gi = DECOUPLED ? g[i] * factor : g[i] * factor + l2 * p[i];
        m[i] = beta1 * m[i] + one_beta1 * gi;
        v[i] = beta2 * v[i] + one_beta2 * gi * gi;
        float numerator = NESTEROV ? beta1 * m[i] + one_beta1 * gi : m[i];
        p[i] = p[i] * keep - step_size * (numerator / (std::sqrt(v[i]) + eps));
    }
    std::memcpy(param, p, floats);
    std::memcpy(exp_avg, m, floats);
    std::memcpy(exp_avg_sq, v, floats);
}

template <int POWER>  // 3: gamma = 1.5; 4: gamma = 2; 0: any
void statistics(const float* g, int64_t n, float gamma, float* out) {
    float power[LANES] = {}, square[LANES] = {}, largest[LANES] = {}, bad[LANES] = {};
    for (int64_t i = 0; i < n; i += LANES) {
        float values[LANES] = {};
        std::memcpy(values, g + i, n - i < LANES ? (n - i) * sizeof(float) : sizeof values);
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
        const float* g = at<const float>(rows[piece.tensor].grad) + piece.start;
        float* out = &partials[4 * i];
        if (gamma == 1.5f) statistics<3>(g, piece.length, gamma, out);
        else if (gamma == 2.0f) statistics<4>(g, piece.length, gamma, out);
        else statistics<0>(g, piece.length, gamma, out);
    });
    std::vector<double> sums(4 * (per_tensor ? tensors : 1), 0.0);
    for (size_t i = 0; i < pieces.size(); ++i) {
        double* out = &sums[per_tensor ? 4 * pieces[i].tensor : 0];
        for (int k : {0, 1, 3}) out[k] += partials[4 * i + k];
        out[2] = std::max<double>(out[2], partials[4 * i + 2]);
    }
    for (size_t i = 0; i < sums.size(); ++i) totals[i] = float(sums[i]);
}

// values: one for each control row. multipliers: float, by Row::index, or null.
void lion(const Row* rows, int64_t tensors, const Values* values, const float* multipliers, int coded, int,
          int threads) {
    auto pieces = cut(rows, tensors);
    parallel(pieces.size(), threads, [&](int64_t i) {
        const Piece& piece = pieces[i];
        const Row& row = rows[piece.tensor];
        const Values& c = values[row.row];
        if (c.skip != 0) return;
        float lr = multipliers ? c.lr * multipliers[row.index] : c.lr;
        auto block = coded ? lion_block<true> : lion_block<false>;
        for (int64_t k = 0; k < piece.length; k += BLOCK)
            block(row, c, lr, piece.start + k, std::min(BLOCK, piece.length - k));
    });
}

void adamw(const Row* rows, int64_t tensors, const Values* values, const float* multipliers, int, int flags,
           int threads) {
    const bool nesterov = flags & 1, decoupled = flags & 2;  // the order of rules/adamw.py
    auto pieces = cut(rows, tensors);
    parallel(pieces.size(), threads, [&](int64_t i) {
        const Piece& piece = pieces[i];
        const Row& row = rows[piece.tensor];
        const Values& c = values[row.row];
        if (c.skip != 0) return;
        float step = multipliers ? c.step_size * multipliers[row.index] : c.step_size;
        auto block = nesterov ? (decoupled ? adamw_block<true, true> : adamw_block<true, false>)
                              : (decoupled ? adamw_block<false, true> : adamw_block<false, false>);
        for (int64_t k = 0; k < piece.length; k += BLOCK)
            block(row, c, step, piece.start + k, std::min(BLOCK, piece.length - k));
    });
}
}
