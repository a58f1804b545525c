// kv_append: rows of keys and values into a page, keys rotated and both made compact on the way. kv_read: the way back.
// Layouts: python/llama1m_ext/formats.py. Codes and scales are those of src/cpu/codes.rs, bit for bit.
//
// A block has a tile: GROUP tokens of a head, whose keys share scales. Compact sides go through shared memory, as float32
// [GROUP][PITCH]: scales of keys run along its columns, units of keys lie token by token, rows channel by channel, and either
// direction is to be read and written in whole lines. Four more floats to a row keep 16-byte accesses of 8 neighbours in
// both directions on different banks. Dense sides go through registers.
//
//   kv_append  grid: x = tiles, from row 0 on; y = 2 * head, + 1 for values; z = batch
//   kv_read    grid: x = groups of the page that are touched, y = heads, z = batch
//   THREADS 256, dynamic shared memory smem_bytes(head_dim), smem_bytes(0) where nothing is compact
#include "encode.cuh"
#include "phase.cuh"
#include "vectors.cuh"

constexpr int THREADS = 256, MAX_WIDTH = 256;

constexpr PRIM int pitch_of(int width) { return width + 4; }
// Turns, scales and offsets, tile.
constexpr PRIM int smem_bytes(int width) { return MAX_PAIRS * 8 + MAX_WIDTH * (int)sizeof(Scale) + (width ? GROUP * pitch_of(width) * 4 : 0); }
static_assert(smem_bytes(MAX_WIDTH) == 70656 && smem_bytes(0) == 4096, "src/cuda/kernels.rs has the same");

struct alignas(16) Four {
    float x[4];
};

// Where a block is.
struct Tile {
    int b, h;
    int width, pitch;  // of compact rows
    Scale* scales;     // keys: [width], values: [width / GROUP][GROUP tokens]
    float* at;         // [GROUP][pitch]
};

PRIM Tile tile_of(uint8_t* smem, int h, int head_dim) {
    const int width = round_up(head_dim, GROUP);
    Scale* const scales = (Scale*)(smem + MAX_PAIRS * 8);
    return {(int)blockIdx.z, h, width, pitch_of(width), scales, (float*)(scales + MAX_WIDTH)};
}

PRIM Four four(const Tile& tile, int t, int c) { return *(const Four*)(tile.at + t * tile.pitch + c); }

template <int N>
struct Part {
    float x[N];
};

// use(m, load(m)) for the block's m < count, several loads on their way before the first is used: as many as a tile of 128 bf16
// has for a thread.
template <class Load, class Use>
PRIM void each_ahead(int count, Load load, Use use) {
    constexpr int AHEAD = 4;
    for (int m0 = threadIdx.x; m0 < count; m0 += AHEAD * THREADS) {
        decltype(load(0)) x[AHEAD];
        UNROLL for (int j = 0; j < AHEAD; j++)
            if (m0 + j * THREADS < count) x[j] = load(m0 + j * THREADS);
        UNROLL for (int j = 0; j < AHEAD; j++)
            if (m0 + j * THREADS < count) use(m0 + j * THREADS, x[j]);
    }
}

// Least and most of some numbers. The sum is NaN where one is none: comparisons pass it over.
struct Range {
    float least, most, sum;
};

PRIM void widen(Range& r, float x) {
    r.least = x < r.least ? x : r.least;
    r.most = x > r.most ? x : r.most;
    r.sum = add_rn(r.sum, mul_rn(x, 0.f));
}

// -- append --------------------------------------------------------------------------------------------------------------

// The rows of a tile, `n` from i0 on, rotated: put(token of the tile, channel, N elements as float32).
template <int DTYPE, int N, class Put>
PRIM void each_part(const Append& p, const View& rows, const uint64_t* turns, int pairs, int h, int i0, int n, Put put) {
    const int b = blockIdx.z, steps = pairs / N, rest = (p.head_dim - 2 * pairs) / N;
    for (int m = threadIdx.x; m < n * steps; m += THREADS) {
        const int t = m / steps, d = m % steps * N;
        const uint64_t row = row_address(rows, b, h, i0 + t);
        float x[N], y[N];
        load_elements<DTYPE, N>(row, d, x);
        load_elements<DTYPE, N>(row, d + pairs, y);
        const int64_t position = position_of(p.rotation, b, i0 + t);
        UNROLL for (int e = 0; e < N; e++) rotate(x[e], y[e], phase(position, turns[d + e], p.rotation.scaling));
        put(t, d, x);
        put(t, d + pairs, y);
    }
    each_ahead(
        n * rest,
        [&](int m) {
            Part<N> part;
            load_elements<DTYPE, N>(row_address(rows, b, h, i0 + m / rest), 2 * pairs + m % rest * N, part.x);
            return part;
        },
        [&](int m, const Part<N>& part) { put(m / rest, 2 * pairs + m % rest * N, part.x); });
}

// A scale for each channel over the tile's tokens; and none for channels beyond head_dim.
template <int FORMAT>
PRIM void scale_keys(const Tile& tile, const Side& page, int group, int n, int head_dim) {
    uint16_t* const params = (uint16_t*)row_address(page.params, tile.b, tile.h, group);
    for (int c = threadIdx.x; c < tile.width; c += THREADS) {
        Scale s = scale_of(0.f, 0.f);
        if (c < head_dim) {
            Range range = {tile.at[c], tile.at[c], 0.f};
            for (int t = 0; t < n; t++) widen(range, tile.at[t * tile.pitch + c]);
            s = scale_for<FORMAT>(add_rn(range.least, range.sum), range.most);
        }
        tile.scales[c] = s;
        params[c] = param_bits(s.scale);
        params[tile.width + c] = param_bits(s.offset);
    }
}

// A scale for each GROUP channels of each token. first: token of the page that the tile's first is.
template <int FORMAT>
PRIM void scale_values(const Tile& tile, const Side& page, int first, int n, int head_dim) {
    const int blocks = tile.width / GROUP;
    for (int m = threadIdx.x; m < blocks * GROUP; m += THREADS) {
        const int t = m % GROUP, block = m / GROUP;
        if (t >= n) continue;
        const int c0 = block * GROUP, c1 = c0 + GROUP < head_dim ? c0 + GROUP : head_dim;
        const float x0 = tile.at[t * tile.pitch + c0];
        Range range = {x0, x0, 0.f};
        for (int c = c0; c < c1; c += 4) {
            const Four x = four(tile, t, c);
            UNROLL for (int e = 0; e < 4; e++)
                if (c + e < c1) widen(range, x.x[e]);
        }
        const Scale s = scale_for<FORMAT>(add_rn(range.least, range.sum), range.most);
        tile.scales[m] = s;
        ((uint16_t*)row_address(page.params, tile.b, tile.h, block))[first + t] = param_bits(s.scale);
        ((uint16_t*)row_address(page.params, tile.b, tile.h, blocks + block))[first + t] = param_bits(s.offset);
    }
}

// Units of 4 bytes of one token, [unit][GROUP tokens].
template <int FORMAT>
PRIM void encode_keys(const Tile& tile, const Side& page, int group, int n, int head_dim) {
    constexpr int FOLD = FORMAT == INT4 ? 8 : 4;
    uint32_t* const units = (uint32_t*)row_address(page.rows, tile.b, tile.h, group);
    for (int m = threadIdx.x; m < tile.width / FOLD * GROUP; m += THREADS) {
        const int t = m % GROUP, c0 = m / GROUP * FOLD;
        if (t >= n) continue;
        uint32_t unit = 0;
        UNROLL for (int part = 0; part < FOLD; part += 4) {
            const Four x = four(tile, t, c0 + part);
            UNROLL for (int e = 0; e < 4; e++) {
                const int i = part + e;  // int4: even channels in the low half, odd ones in the high half
                unit |= code_of<FORMAT>(x.x[e], tile.scales[c0 + i]) << (FORMAT == INT4 ? 4 * (i / 2) + 16 * (i % 2) : 8 * i);
            }
        }
        units[m] = unit;
    }
}

// Four channels of a value's row as a word of bytes, each code in the low bits of its byte.
template <int FORMAT>
PRIM uint32_t four_codes(const Tile& tile, int t, int c, int head_dim) {
    const Four x = four(tile, t, c);
    const Scale s = tile.scales[c / GROUP * GROUP + t];
    uint32_t word = 0;
    // Channels beyond head_dim stand for the offset: code 0.
    UNROLL for (int e = 0; e < 4; e++)
        word |= code_of<FORMAT>(x.x[e], {c + e < head_dim ? s.scale : 0.f, s.offset, s.inverse}) << (8 * e);
    return word;
}

template <int FORMAT>
PRIM void encode_values(const Tile& tile, const Side& page, int first, int n, int head_dim) {
    const int words = tile.width / (FORMAT == INT4 ? 8 : 4);
    for (int m = threadIdx.x; m < n * words; m += THREADS) {
        const int t = m / words, w = m % words;
        uint32_t word;
        if constexpr (FORMAT == INT4) {  // of 64 channels byte i has channel i in its low half, 32 + i in its high half
            const int c = w / 8 * GROUP + w % 8 * 4;
            word = four_codes<FORMAT>(tile, t, c, head_dim) | four_codes<FORMAT>(tile, t, c + GROUP / 2, head_dim) << 4;
        } else {
            word = four_codes<FORMAT>(tile, t, w * 4, head_dim);
        }
        ((uint32_t*)row_address(page.rows, tile.b, tile.h, first + t))[w] = word;
    }
}

template <int FORMAT>
PRIM void make_compact(const Tile& tile, const Side& page, bool is_key, int first, int n, int head_dim) {
    if (is_key) {
        scale_keys<FORMAT>(tile, page, first / GROUP, n, head_dim);
        block_sync();
        encode_keys<FORMAT>(tile, page, first / GROUP, n, head_dim);
    } else {
        scale_values<FORMAT>(tile, page, first, n, head_dim);
        block_sync();
        encode_values<FORMAT>(tile, page, first, n, head_dim);
    }
}

// Where a block of kv_append works.
struct Job {
    int h, i0, n, first;  // head, row and rows of the tile; token of the page that the first row becomes
    bool is_key;
};

// Rows into a dense page, or into the tile.
template <int DTYPE, int N>
PRIM void take_rows(const Append& p, const Job& job, const uint64_t* turns, const Tile& tile) {
    const View& rows = job.is_key ? p.k : p.v;
    const Side& page = job.is_key ? p.page_k : p.page_v;
    const int pairs = job.is_key ? p.rotation.pairs : 0;
    each_part<DTYPE, N>(p, rows, turns, pairs, job.h, job.i0, job.n, [&](int t, int d, const float(&x)[N]) {
        if (page.format == DENSE)
            store_elements<DTYPE, N>(row_address(page.rows, tile.b, tile.h, job.first + t), d, x);
        else  // what rope_apply would have written, and kv_append read
            UNROLL for (int e = 0; e < N; e++) tile.at[t * tile.pitch + d + e] = rounded<DTYPE>(x[e]);
    });
}

template <int DTYPE>
PRIM void take_any(const Append& p, const Job& job, const uint64_t* turns, const Tile& tile) {
    if (p.wide)
        take_rows<DTYPE, WIDEST<DTYPE>>(p, job, turns, tile);
    else
        take_rows<DTYPE, 1>(p, job, turns, tile);
}

// All dtypes in one: only the beginning differs.
PRIM void append(const Append& p) {
    DYN_SMEM(smem);
    const int i0 = blockIdx.x * GROUP;
    const Job job = {(int)blockIdx.y / 2, i0, p.len - i0 < GROUP ? p.len - i0 : GROUP, p.at + i0, blockIdx.y % 2 == 0};
    const Side& page = job.is_key ? p.page_k : p.page_v;
    const Tile tile = tile_of(smem, job.h, p.head_dim);
    uint64_t* const turns = (uint64_t*)smem;
    if (job.is_key && p.rotation.pairs) {
        // By way of shared memory: threads that read different parameters read them one after another.
        for (int f = threadIdx.x; f < p.rotation.pairs; f += THREADS) turns[f] = p.rotation.turns[f];
        block_sync();
    }
    if (p.dtype == F32)
        take_any<F32>(p, job, turns, tile);
    else if (p.dtype == BF16)
        take_any<BF16>(p, job, turns, tile);
    else
        take_any<F16>(p, job, turns, tile);
    if (page.format == DENSE) return;
    block_sync();
    if (page.format == INT8)
        make_compact<INT8>(tile, page, job.is_key, job.first, job.n, p.head_dim);
    else if (page.format == INT4)
        make_compact<INT4>(tile, page, job.is_key, job.first, job.n, p.head_dim);
    else
        make_compact<FP8>(tile, page, job.is_key, job.first, job.n, p.head_dim);
}

// -- read ----------------------------------------------------------------------------------------------------------------

// N elements of a dtype that is known at run time: 4 are float32, 8 are not.
template <int N>
PRIM void take_elements(int dtype, uint64_t row, int d, float (&x)[N]) {
    if constexpr (N <= WIDEST<F32>)
        if (dtype == F32) return load_elements<F32, N>(row, d, x);
    if constexpr (N != WIDEST<F32>) dtype == BF16 ? load_elements<BF16, N>(row, d, x) : load_elements<F16, N>(row, d, x);
}

template <int N>
PRIM void put_elements(int dtype, uint64_t row, int d, const float (&x)[N]) {
    if constexpr (N <= WIDEST<F32>)
        if (dtype == F32) return store_elements<F32, N>(row, d, x);
    if constexpr (N != WIDEST<F32>) dtype == BF16 ? store_elements<BF16, N>(row, d, x) : store_elements<F16, N>(row, d, x);
}

// What code i of a word stands for. int4: `word` has a code in the low half of each byte.
template <int FORMAT>
PRIM float number_of(uint32_t word, int i) {
    const uint32_t byte = word >> (8 * i) & 255;
    if constexpr (FORMAT == INT8)
        return (float)(int8_t)byte;
    else if constexpr (FORMAT == INT4)
        return (float)(byte & 15) - 8.f;
    else
        return e4m3_to_float(byte);
}

// Tokens lo <= token < hi of a page, which are of one group, to rows token - start.
struct Span {
    int lo, hi;
};

// A unit of keys, and the scales and offsets of its channels.
template <int FOLD>
struct Unit {
    uint32_t codes;
    Words<8> scales[FOLD / 4], offsets[FOLD / 4];
};

PRIM float half_at(const Words<8>& w, int i) { return half_to_float((uint16_t)(w.x[i / 2] >> (16 * (i % 2)))); }

// A group of keys to the tile, and its rows out of it.
template <int N, int FORMAT>
PRIM void read_keys(const Read& p, Tile tile, Span span) {
    constexpr int FOLD = FORMAT == INT4 ? 8 : 4;
    const int group = span.lo / GROUP, first = group * GROUP;
    const uint32_t* const units = (const uint32_t*)row_address(p.side.rows, tile.b, tile.h, group);
    const Words<8>* const params = (const Words<8>*)row_address(p.side.params, tile.b, tile.h, group);
    each_ahead(
        tile.width / FOLD * GROUP,
        [&](int m) {
            Unit<FOLD> unit;
            unit.codes = units[m];
            UNROLL for (int i = 0; i < FOLD / 4; i++) {
                const int four = m / GROUP * (FOLD / 4) + i;
                unit.scales[i] = params[four];
                unit.offsets[i] = params[tile.width / 4 + four];
            }
            return unit;
        },
        [&](int m, const Unit<FOLD>& unit) {
            const int t = m % GROUP, c0 = m / GROUP * FOLD;
            UNROLL for (int part = 0; part < FOLD / 4; part++) {
                Four x;
                UNROLL for (int e = 0; e < 4; e++) {
                    const int i = part * 4 + e;
                    const float code = FORMAT == INT4 ? number_of<INT4>(unit.codes >> (4 * (i / 2) + 16 * (i % 2)), 0)
                                                      : number_of<FORMAT>(unit.codes, i);
                    x.x[e] = fma_rn(code, half_at(unit.scales[part], e), half_at(unit.offsets[part], e));
                }
                *(Four*)(tile.at + t * tile.pitch + c0 + part * 4) = x;
            }
        });
    block_sync();
    const int steps = p.head_dim / N;
    for (int m = threadIdx.x; m < (span.hi - span.lo) * steps; m += THREADS) {
        const int i = m / steps, d = m % steps * N, t = span.lo + i - first;
        float x[N];
        UNROLL for (int e = 0; e < N; e++) x[e] = tile.at[t * tile.pitch + d + e];
        put_elements<N>(p.dtype, row_address(p.out, tile.b, tile.h, span.lo + i - p.start), d, x);
    }
}

// N codes of a value, in the low halves of their bytes where they are int4, and their scale.
template <int N>
struct Codes {
    Words<N < 4 ? 4 : N> codes;
    uint16_t scale, offset;
};

template <int N, int FORMAT>
PRIM void read_values(const Read& p, Tile tile, Span span) {
    const int blocks = tile.width / GROUP, steps = p.head_dim / N;
    each_ahead(
        (span.hi - span.lo) * steps,
        [&](int m) {
            const int token = span.lo + m / steps, d = m % steps * N, block = d / GROUP, c = d % GROUP;
            const uint64_t row = row_address(p.side.rows, tile.b, tile.h, token);
            const uint64_t at = FORMAT == INT4 ? row + block * (GROUP / 2) + c % (GROUP / 2) : row + d;
            Codes<N> found;
            if constexpr (N == 1)
                found.codes.x[0] = *(const uint8_t*)at;
            else
                found.codes = *(const Words<N>*)at;
            found.scale = ((const uint16_t*)row_address(p.side.params, tile.b, tile.h, block))[token];
            found.offset = ((const uint16_t*)row_address(p.side.params, tile.b, tile.h, blocks + block))[token];
            return found;
        },
        [&](int m, const Codes<N>& found) {
            const int token = span.lo + m / steps, d = m % steps * N;
            const int shift = FORMAT == INT4 && d % GROUP >= GROUP / 2 ? 4 : 0;
            const float scale = half_to_float(found.scale), offset = half_to_float(found.offset);
            float x[N];
            UNROLL for (int e = 0; e < N; e++)
                x[e] = fma_rn(number_of<FORMAT>(found.codes.x[e / 4] >> shift, e % 4), scale, offset);
            put_elements<N>(p.dtype, row_address(p.out, tile.b, tile.h, token - p.start), d, x);
        });
}

template <int N>
PRIM void read_dense(const Read& p, Tile tile, Span span) {
    const int steps = p.head_dim / N;
    each_ahead(
        (span.hi - span.lo) * steps,
        [&](int m) {
            Part<N> part;
            take_elements<N>(p.dtype, row_address(p.side.rows, tile.b, tile.h, span.lo + m / steps), m % steps * N, part.x);
            return part;
        },
        [&](int m, const Part<N>& part) {
            const int token = span.lo + m / steps;
            put_elements<N>(p.dtype, row_address(p.out, tile.b, tile.h, token - p.start), m % steps * N, part.x);
        });
}

template <int N, int FORMAT>
PRIM void read_compact(const Read& p, Tile tile, Span span) {
    if (p.is_key)
        read_keys<N, FORMAT>(p, tile, span);
    else
        read_values<N, FORMAT>(p, tile, span);
}

template <int N>
PRIM void read(const Read& p) {
    DYN_SMEM(smem);
    const Tile tile = tile_of(smem, blockIdx.y, p.head_dim);
    const int first = (p.start / GROUP + (int)blockIdx.x) * GROUP, end = p.start + p.len;
    const Span span = {first > p.start ? first : p.start, first + GROUP < end ? first + GROUP : end};
    if (p.side.format == DENSE)
        read_dense<N>(p, tile, span);
    else if (p.side.format == INT8)
        read_compact<N, INT8>(p, tile, span);
    else if (p.side.format == INT4)
        read_compact<N, INT4>(p, tile, span);
    else
        read_compact<N, FP8>(p, tile, span);
}

KERNEL(THREADS, 3) kv_append(PARAM Append p) { append(p); }

KERNEL(THREADS, 3) kv_read(PARAM Read p) {
    if (!p.wide)
        read<1>(p);
    else if (p.dtype == F32)
        read<WIDEST<F32>>(p);
    else
        read<WIDEST<BF16>>(p);
}
