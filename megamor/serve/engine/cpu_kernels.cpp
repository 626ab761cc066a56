// Decoding on a CPU: what torch computes with many small operations, each in one pass over memory.
//
// A step of a few rows is bound by reading weights and the KV cache. torch's attention needs the pages of a sequence
// gathered first, which moves every key and value three times, and dispatches some 25 operations a layer. Here keys and
// values are read once, where they are.
//
// Keys of 16 neighbours are stored transposed, k_pages [pages, kv_heads, page_size / 16, head_dim, 16], so that one
// vector holds a component of 16 keys and scores need no sum across lanes. v_pages are [pages, page_size, kv_heads,
// head_dim]. Sums are in fp32 for both types, and a row's result doesn't depend on the rows it was batched with.
// Compiled and called by cpu_kernels.py; head_dim and page_size are multiples of 16.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

using std::int64_t;
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t bits __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

constexpr int LANES = 16;
// Keys between two changes of the running maximum.
constexpr int SPAN = 64;
// Query heads that share a load of keys. With fewer, keys are read again; with more, their scores leave the cache.
constexpr int MOST_QUERIES = 32;
// Elements below which starting a team of threads takes longer than the work.
constexpr int64_t WORTH_A_TEAM = 1 << 14;

struct bf16 {
    uint16_t high;
};

inline float value(float x) { return x; }
inline float value(bf16 x) {
    uint32_t wide = uint32_t(x.high) << 16;
    float y;
    std::memcpy(&y, &wide, 4);
    return y;
}
inline void put(float* to, float x) { *to = x; }
inline void put(bf16* to, float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    to->high = uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);  // to nearest, ties to even
}
inline vec load(const float* from) {
    vec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline vec load(const bf16* from) {
    halves high;
    std::memcpy(&high, from, sizeof high);
    return (vec)(__builtin_convertvector(high, bits) << 16);
}
inline void store(float* to, vec x) { std::memcpy(to, &x, sizeof x); }
inline void store(bf16* to, vec x) {
    bits wide = (bits)x;
    halves high = __builtin_convertvector((wide + 0x7fff + ((wide >> 16) & 1)) >> 16, halves);
    std::memcpy(to, &high, sizeof high);
}
inline vec all(float x) { return x - vec{}; }
inline float sum(vec x) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += x[lane];
    return total;
}
inline float largest(vec x) {
    float most = x[0];
    for (int lane = 1; lane < LANES; lane++) most = std::max(most, x[lane]);
    return most;
}

// exp(x) to 2 units in the last place: 2^n times the polynomial of the Cephes library on the rest; 0 below -87.
inline vec exponential(vec x) {
    vec bounded = x < -87.0f ? all(-87.0f) : x;
    bounded = bounded > 88.0f ? all(88.0f) : bounded;
    vec n = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f;  // adding 1.5 · 2^23 rounds to an integer
    vec r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vec scaled = p * (vec)((__builtin_convertvector(n, ints) + 127) << 23);
    return x < -87.0f ? vec{} : scaled;
}

template <typename T>
void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t dim, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * dim > WORTH_A_TEAM)
    for (int64_t row = 0; row < rows; row++) {
        const T* from = x + row * dim;
        T* to = out + row * dim;
        vec squares = {};
        int64_t i = 0;
        for (; i + LANES <= dim; i += LANES) squares += load(from + i) * load(from + i);
        float total = sum(squares);
        for (; i < dim; i++) total += value(from[i]) * value(from[i]);
        const float scale = 1 / std::sqrt(total / dim + eps);
        for (i = 0; i + LANES <= dim; i += LANES) store(to + i, load(from + i) * scale * load(weight + i));
        for (; i < dim; i++) put(to + i, value(from[i]) * scale * value(weight[i]));
    }
}

// gate_up [rows, 2 · dim] to SiLU(gate) · up, [rows, dim].
template <typename T>
void swiglu(const T* gate_up, T* out, int64_t rows, int64_t dim, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * dim > WORTH_A_TEAM)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = gate_up + 2 * row * dim, *up = gate + dim;
        T* to = out + row * dim;
        int64_t i = 0;
        for (; i + LANES <= dim; i += LANES) {
            vec g = load(gate + i);
            store(to + i, g / (1.0f + exponential(-g)) * load(up + i));
        }
        for (; i < dim; i++) put(to + i, value(gate[i]) / (1 + std::exp(-value(gate[i]))) * value(up[i]));
    }
}

// Rotates the queries and keys in qkv [rows, heads + 2 · kv_heads, dim], and puts keys and values at addresses [rows].
template <typename T>
void rotate_and_store(T* qkv, const float* cos, const float* signed_sin, const int64_t* addresses, T* k_pages,
                      T* v_pages, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, int64_t page_size,
                      int threads) {
    const int64_t half = dim / 2, width = (heads + 2 * kv_heads) * dim;
#pragma omp parallel for num_threads(threads) if (rows * width > WORTH_A_TEAM)
    for (int64_t row = 0; row < rows; row++) {
        const float *c = cos + row * dim, *s = signed_sin + row * dim;
        for (int64_t head = 0; head < heads + kv_heads; head++) {
            T *first = qkv + row * width + head * dim, *second = first + half;
            for (int64_t i = 0; i < half; i++) {
                const float a = value(first[i]), b = value(second[i]);
                put(first + i, a * c[i] + b * s[i]);
                put(second + i, b * c[half + i] + a * s[half + i]);
            }
        }
        const int64_t page = addresses[row] / page_size, offset = addresses[row] % page_size;
        const T *k = qkv + row * width + heads * dim, *v = k + kv_heads * dim;
        std::memcpy(v_pages + addresses[row] * kv_heads * dim, v, kv_heads * dim * sizeof(T));
        for (int64_t head = 0; head < kv_heads; head++) {
            T* to = k_pages + ((page * kv_heads + head) * page_size + offset / LANES * LANES) * dim + offset % LANES;
            for (int64_t i = 0; i < dim; i++) to[i * LANES] = k[head * dim + i];
        }
    }
}

// scores [N, SPAN], 16 of each: queries [N, dim] times the keys [dim, 16].
template <int N, typename T>
inline void score(const float* queries, const T* keys, float* scores, int64_t dim) {
    vec total[N] = {};
    for (int64_t i = 0; i < dim; i++) {
        const vec k = load(keys + i * LANES);
        for (int n = 0; n < N; n++) total[n] += queries[n * dim + i] * k;
    }
    for (int n = 0; n < N; n++) store(scores + n * SPAN, total[n]);
}

// Adds weights [N, SPAN] times the first `count` values, which are `stride` apart, to outs [N, dim].
template <int N, typename T>
inline void add_values(const float* weights, const T* values, int64_t stride, int64_t count, float* outs, int64_t dim) {
    for (int64_t i = 0; i < dim; i += LANES) {
        vec total[N];
        for (int n = 0; n < N; n++) total[n] = load(outs + n * dim + i);
        for (int64_t j = 0; j < count; j++) {
            const vec v = load(values + j * stride + i);
            for (int n = 0; n < N; n++) total[n] += weights[n * SPAN + j] * v;
        }
        for (int n = 0; n < N; n++) store(outs + n * dim + i, total[n]);
    }
}

// Pages are in no order, so the processor doesn't foresee which memory comes next.
inline void fetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

// f(N, first) for groups of N among `count` queries; N is a type's constant, so that loops over a group are unrolled.
template <typename F>
inline void in_groups(int64_t count, F f) {
    int64_t first = 0;
    for (; first + 8 <= count; first += 8) f(std::integral_constant<int, 8>(), first);
    for (; first + 4 <= count; first += 4) f(std::integral_constant<int, 4>(), first);
    for (; first < count; first++) f(std::integral_constant<int, 1>(), first);
}

struct Sight {
    int64_t begin, end;
};

template <typename T>
void attend(const T* qkv, const T* k_pages, const T* v_pages, const int32_t* tables, const int64_t* owners,
            const int64_t* ends, const int64_t* begins, T* out, int64_t rows, int64_t heads, int64_t kv_heads,
            int64_t dim, int64_t page_size, int64_t table_length, int threads) {
    const int64_t group = heads / kv_heads, width = (heads + 2 * kv_heads) * dim;
    const int64_t most_rows = std::max<int64_t>(1, MOST_QUERIES / group), most = most_rows * group;
    // Rows of one owner (a chunk of a prompt) read the same keys, so they are neighbours in a task.
    std::vector<std::pair<int64_t, int64_t>> runs;
    for (int64_t row = 0; row < rows; row++) {
        const bool joins = !runs.empty() && owners[runs.back().first] == owners[row];
        if (joins && row - runs.back().first < most_rows) runs.back().second = row + 1;
        else runs.push_back({row, row + 1});
    }
    const int64_t tasks = int64_t(runs.size()) * kv_heads;
#pragma omp parallel num_threads(threads) if (tasks > 1)
    {
        std::vector<float> q(most * dim), o(most * dim), p(most * SPAN), top(most), total(most);
        std::vector<Sight> sights(most);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            const auto [first, last] = runs[task / kv_heads];
            const int64_t head = task % kv_heads, count = (last - first) * group;
            const int32_t* pages = tables + owners[first] * table_length;
            const float scale = 1 / std::sqrt(float(dim));
            int64_t begin = INT64_MAX, end = 0;
            for (int64_t n = 0; n < count; n++) {
                const int64_t row = first + n / group;
                const T* from = qkv + row * width + (head * group + n % group) * dim;
                for (int64_t i = 0; i < dim; i++) q[n * dim + i] = value(from[i]) * scale;
                sights[n] = {begins ? begins[row] : 0, ends[row]};
                begin = std::min(begin, sights[n].begin);
                end = std::max(end, sights[n].end);
            }
            const auto keys_at = [&](int64_t key) {
                return k_pages + ((pages[key / page_size] * kv_heads + head) * page_size + key % page_size) * dim;
            };
            const auto values_at = [&](int64_t key) {
                return v_pages + ((pages[key / page_size] * page_size + key % page_size) * kv_heads + head) * dim;
            };
            std::fill_n(o.begin(), count * dim, 0.0f);
            std::fill_n(top.begin(), count, -INFINITY);
            std::fill_n(total.begin(), count, 0.0f);
            for (int64_t base = begin / LANES * LANES; base < end; base += SPAN) {
                const int64_t parts = std::min<int64_t>(SPAN, end - base + LANES - 1) / LANES;
                for (int64_t part = 0; part < parts; part++) {
                    const int64_t key = base + part * LANES;
                    const T *keys = keys_at(key), *values = values_at(key);
                    for (int64_t i = 0; i < LANES; i++) fetch(values + i * kv_heads * dim, dim * sizeof(T));
                    in_groups(count, [&](auto size, int64_t n) {
                        score<size()>(&q[n * dim], keys, &p[n * SPAN + part * LANES], dim);
                    });
                }
                for (int64_t n = 0; n < count; n++) {
                    vec best = all(-INFINITY), weights = {};
                    for (int64_t part = 0; part < parts; part++) {
                        float* at = &p[n * SPAN + part * LANES];
                        ints key;
                        for (int lane = 0; lane < LANES; lane++) key[lane] = int32_t(base + part * LANES) + lane;
                        const vec hidden = all(-INFINITY);
                        vec x = key < int32_t(sights[n].end) ? load(at) : hidden;
                        x = key >= int32_t(sights[n].begin) ? x : hidden;
                        store(at, x);
                        best = x > best ? x : best;
                    }
                    // NaN compares as smaller, and shows in the weights below.
                    const float now = std::max(top[n], largest(best));
                    // A row with a later window sees none of these.
                    const float shift = now == -INFINITY ? 0 : now, kept = std::exp(top[n] - shift);
                    for (int64_t part = 0; part < parts; part++) {
                        float* at = &p[n * SPAN + part * LANES];
                        const vec x = exponential(load(at) - shift);
                        store(at, x);
                        weights += x;
                    }
                    total[n] = total[n] * kept + sum(weights);
                    if (kept != 1)
                        for (int64_t i = 0; i < dim; i++) o[n * dim + i] *= kept;
                    top[n] = now;
                }
                for (int64_t part = 0; part < parts; part++) {
                    const int64_t key = base + part * LANES;
                    if (key + SPAN < end) fetch(keys_at(key + SPAN), LANES * dim * sizeof(T));
                    const T* values = values_at(key);
                    in_groups(count, [&](auto size, int64_t n) {
                        add_values<size()>(&p[n * SPAN + part * LANES], values, kv_heads * dim,
                                           std::min<int64_t>(LANES, end - key), &o[n * dim], dim);
                    });
                }
            }
            for (int64_t n = 0; n < count; n++) {
                T* to = out + ((first + n / group) * heads + head * group + n % group) * dim;
                for (int64_t i = 0; i < dim; i++) put(to + i, o[n * dim + i] / total[n]);
            }
        }
    }
}

}  // namespace

#define KERNELS(T, SUFFIX)                                                                                            \
    extern "C" void rms_norm_##SUFFIX(const T* x, const T* weight, T* out, int64_t rows, int64_t dim, float eps,      \
                                      int threads) {                                                                  \
        rms_norm(x, weight, out, rows, dim, eps, threads);                                                            \
    }                                                                                                                 \
    extern "C" void swiglu_##SUFFIX(const T* gate_up, T* out, int64_t rows, int64_t dim, int threads) {               \
        swiglu(gate_up, out, rows, dim, threads);                                                                     \
    }                                                                                                                 \
    extern "C" void rotate_and_store_##SUFFIX(T* qkv, const float* cos, const float* signed_sin,                      \
                                              const int64_t* addresses, T* k_pages, T* v_pages, int64_t rows,         \
                                              int64_t heads, int64_t kv_heads, int64_t dim, int64_t page_size,        \
                                              int threads) {                                                          \
        rotate_and_store(qkv, cos, signed_sin, addresses, k_pages, v_pages, rows, heads, kv_heads, dim, page_size,    \
                         threads);                                                                                    \
    }                                                                                                                 \
    extern "C" void attend_##SUFFIX(const T* qkv, const T* k_pages, const T* v_pages, const int32_t* tables,          \
                                    const int64_t* owners, const int64_t* ends, const int64_t* begins, T* out,        \
                                    int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, int64_t page_size,    \
                                    int64_t table_length, int threads) {                                              \
        attend(qkv, k_pages, v_pages, tables, owners, ends, begins, out, rows, heads, kv_heads, dim, page_size,       \
               table_length, threads);                                                                                \
    }

KERNELS(float, float32)
KERNELS(bf16, bfloat16)
