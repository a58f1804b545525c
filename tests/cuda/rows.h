// Memory for the checks of small kernels: [batch, heads, len, dim] with strides to choose, NaN in every byte that is not a row,
// and a look afterwards whether those bytes are still there.
#pragma once
#include "elements.cuh"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

inline const char* name_of_dtype(int dtype) { return dtype == F32 ? "f32" : dtype == BF16 ? "bf16" : "f16"; }
// Half of the distance of neighbours, relative and (float16's subnormals) absolute.
inline double half_step(int dtype) { return dtype == F32 ? 0x1p-24 : dtype == BF16 ? 0x1p-8 : 0x1p-11; }
inline double least_step(int dtype) { return dtype == F16 ? 0x1p-25 : 0; }

// How rows lie.
struct Layout {
    bool tokens_first = false;  // [batch, len, heads, dim]
    int pad = 0;                // bytes after a row
    int shift = 0;              // bytes before the first one
};

class Rows {
  public:
    int dtype, batch, heads, len, dim;

    Rows(int dtype, int batch, int heads, int len, int dim, Layout layout = {})
        : dtype(dtype), batch(batch), heads(heads), len(len), dim(dim) {
        size = dtype == F32 ? 4 : 2;
        const int64_t row = (int64_t)dim * size + layout.pad;
        row_stride = layout.tokens_first ? row * heads : row;
        head_stride = layout.tokens_first ? row : row * len;
        batch_stride = row * heads * len;
        memory.assign(batch_stride * batch + 64 + layout.shift, 0xff);
        start = (64 - (uintptr_t)memory.data() % 64) % 64 + layout.shift;
    }
    Rows(const Rows&) = delete;

    View view() const {
        return {(uint64_t)memory.data() + start, batch_stride, head_stride, row_stride};
    }
    uint64_t row(int b, int h, int i) const { return row_address(view(), b, h, i); }
    double get(int b, int h, int i, int d) const {
        const uint64_t at = row(b, h, i);
        return dtype == F32 ? load_element<F32>(at, d) : dtype == BF16 ? load_element<BF16>(at, d) : load_element<F16>(at, d);
    }
    void set(int b, int h, int i, int d, double x) {
        const uint64_t at = row(b, h, i);
        if (dtype == F32)
            store_element<F32>(at, d, (float)x);
        else if (dtype == BF16)
            store_element<BF16>(at, d, (float)x);
        else
            store_element<F16>(at, d, (float)x);
    }
    template <class F>
    void each(F f) const {
        for (int b = 0; b < batch; b++)
            for (int h = 0; h < heads; h++)
                for (int i = 0; i < len; i++)
                    for (int d = 0; d < dim; d++) f(b, h, i, d);
    }
    template <class Random>
    void fill(Random& random, double scale = 1) {
        std::normal_distribution<double> normal(0, scale);
        each([&](int b, int h, int i, int d) { set(b, h, i, d, normal(random)); });
    }
    // All of it, with what lies around the rows.
    const std::vector<uint8_t>& bytes() const { return memory; }
    // Whether every byte outside of the rows is as it was.
    bool is_clean() const {
        std::vector<uint8_t> seen = memory;
        for (int b = 0; b < batch; b++)
            for (int h = 0; h < heads; h++)
                for (int i = 0; i < len; i++)
                    std::memset(seen.data() + (row(b, h, i) - (uint64_t)memory.data()), 0xff, (size_t)dim * size);
        for (uint8_t byte : seen)
            if (byte != 0xff) return false;
        return true;
    }

  private:
    int size;
    int64_t batch_stride, head_stride, row_stride;
    size_t start;
    std::vector<uint8_t> memory;
};

// The worst of many errors, each as a share of what is allowed.
struct Worst {
    double share = 0, error = 0;
    void see(double got, double want, double allowed) {
        if (std::isnan(want) && std::isnan(got)) return;
        const double e = got == want ? 0 : std::fabs(got - want);  // infinities
        if (!(e <= allowed * share)) {                             // a NaN is the worst of all
            share = allowed > 0 && e == e ? e / allowed : e == 0 ? share : INFINITY;
            error = e;
        }
    }
    bool good() const { return share <= 1; }
};

constexpr cpu::Mode MODES[] = {cpu::EAGER, cpu::LAZY, cpu::RANDOM};
