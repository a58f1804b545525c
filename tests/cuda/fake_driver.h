// What fake_driver.cpp and the objects of the kernel files share: the table of entries.
#pragma once
#include "emulation.h"

#include <algorithm>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace fake {

struct Entry {
    const char* name;
    int threads;                             // of its launch bounds
    std::function<void(void**)> call;        // with pointers to the arguments, as cuLaunchKernel has them
};

std::vector<Entry>& entries();

template <class... A, size_t... I>
std::function<void(void**)> wrapped(void (*kernel)(A...), std::index_sequence<I...>) {
    return [kernel](void** p) { kernel(*(std::remove_const_t<std::remove_reference_t<A>>*)p[I]...); };
}

struct Registered {
    template <class... A>
    Registered(const char* name, int threads, void (*kernel)(A...)) {
        entries().push_back({name, threads, wrapped(kernel, std::index_sequence_for<A...>{})});
    }
};

// The driver's checks of what TMA can do, then the map as the emulation reads it. 128-byte swizzle, no interleave.
inline bool encode_tensor_map(TensorMap* map, int type, uint32_t rank, void* base, const uint64_t* dim, const uint64_t* stride,
                              const uint32_t* box, const uint32_t* element_stride, int interleave, int swizzle) {
    const bool two_bytes = type == 6 || type == 9;  // FLOAT16, BFLOAT16
    if (!two_bytes || rank < 3 || rank > 4 || interleave != 0 || swizzle != 3 || ((uintptr_t)map & 63) || ((uintptr_t)base & 15))
        return false;
    if (box[0] * 2 > 128)
        return false;
    for (uint32_t i = 0; i < rank; i++)
        if (element_stride[i] != 1 || dim[i] == 0 || dim[i] > (1ull << 32) || box[i] == 0 || box[i] > 256)
            return false;
    for (uint32_t i = 0; i + 1 < rank; i++)
        if (stride[i] % 16 || stride[i] >= (1ull << 40))
            return false;
    tmap_encode_sw128(map, (int)rank, base, dim, stride, box);
    return true;
}

}  // namespace fake
