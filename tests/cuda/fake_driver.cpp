// libcuda.so.1 for machines without a GPU: device memory is host memory, and a launch runs the emulated kernel of that name, at
// once. So the whole way from Python through Rust to the kernel runs in CI, with the driver's own checks of arguments.
//
// build.py links this with one object for each kernel file, which puts its entries into the table. Told by the environment:
// LLAMA1M_FAKE_MODE eager (default), lazy or random: when asynchronous work is done; LLAMA1M_FAKE_SEED; LLAMA1M_FAKE_CAPABILITY
// (default 9.0); LLAMA1M_FAKE_DEVICES (default 1); LLAMA1M_FAKE_REFUSES: the number of a device that answers nothing.
#define SHIM_IMPL
#include "fake_driver.h"

#include <dlfcn.h>

namespace fake {

std::vector<Entry>& entries() {
    static std::vector<Entry> table;
    return table;
}

namespace {

enum Status { SUCCESS = 0, INVALID_VALUE = 1, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500, NOT_PERMITTED = 800 };

struct Module {
    std::string image;  // searched for names: a function is found only where the image has it
};
struct Function {
    const Entry* entry;
    int smem = 48 << 10;
};

constexpr int MAX_DEVICES = 8;
char contexts[MAX_DEVICES];  // their addresses are the handles
int retained[MAX_DEVICES];    // how often each was asked for
thread_local void* current = nullptr;

const char* from_environment(const char* name, const char* otherwise) {
    const char* value = std::getenv(name);
    return value && *value ? value : otherwise;
}

int capability() {  // 90 for 9.0
    int major = 9, minor = 0;
    std::sscanf(from_environment("LLAMA1M_FAKE_CAPABILITY", "9.0"), "%d.%d", &major, &minor);
    return 10 * major + minor;
}

int devices() { return std::min(MAX_DEVICES, std::max(0, std::atoi(from_environment("LLAMA1M_FAKE_DEVICES", "1")))); }

int shared_memory() {  // bytes that one block can be given
    switch (capability()) {
        case 80: case 87: return 163 << 10;
        case 86: case 89: case 120: return 99 << 10;
        default: return 227 << 10;
    }
}

cpu::Mode mode() {
    switch (*from_environment("LLAMA1M_FAKE_MODE", "eager")) {
        case 'l': return cpu::LAZY;
        case 'r': return cpu::RANDOM;
        default: return cpu::EAGER;
    }
}

// Bytes of an ELF file: its table of sections stands last. 0: it is none.
size_t elf_bytes(const void* image) {
    const uint8_t* bytes = (const uint8_t*)image;
    if (std::memcmp(bytes, "\x7f" "ELF\x02", 5))
        return 0;
    uint64_t table;
    uint16_t size, count;
    std::memcpy(&table, bytes + 0x28, 8);
    std::memcpy(&size, bytes + 0x3a, 2);
    std::memcpy(&count, bytes + 0x3c, 2);
    // NVIDIA's have program headers after the sections.
    uint64_t programs;
    uint16_t program_size, program_count;
    std::memcpy(&programs, bytes + 0x20, 8);
    std::memcpy(&program_size, bytes + 0x36, 2);
    std::memcpy(&program_count, bytes + 0x38, 2);
    return std::max(table + (uint64_t)size * count, programs + (uint64_t)program_size * program_count);
}

}  // namespace
}  // namespace fake

using namespace fake;
#define API extern "C" __attribute__((visibility("default"))) int

extern "C" __attribute__((visibility("default"))) void llama1m_fake_driver() {}

API cuInit(unsigned) { return SUCCESS; }
API cuGetExportTable(const void**, const void*) { return NOT_FOUND; }  // NVRTC and libcublasLt look for it without a check
API cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
API cuDeviceGetCount(int* count) { return *count = devices(), SUCCESS; }
API cuDeviceGet(int* device, int ordinal) {
    if (ordinal < 0 || ordinal >= devices())
        return INVALID_DEVICE;
    return *device = ordinal, SUCCESS;
}
API cuDeviceGetName(char* name, int length, int) {
    return std::snprintf(name, length, "fake driver, sm_%d", capability()), SUCCESS;
}
API cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = (size_t)80 << 30, SUCCESS; }
API cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (device == std::atoi(from_environment("LLAMA1M_FAKE_REFUSES", "-1")))
        return NOT_PERMITTED;
    switch (attribute) {
        case 16: *value = 132; break;               // multiprocessors
        case 75: *value = capability() / 10; break;  // major
        case 76: *value = capability() % 10; break;
        case 97: *value = shared_memory(); break;  // of a block, opted in
        default: *value = 0;
    }
    return SUCCESS;
}
API cuDevicePrimaryCtxRetain(void** context, int device) {
    if (device < 0 || device >= devices())
        return INVALID_DEVICE;
    retained[device]++;
    return *context = &contexts[device], SUCCESS;
}
extern "C" __attribute__((visibility("default"))) int llama1m_fake_retained(int device) { return retained[device]; }
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxGetCurrent(void** context) { return *context = current, SUCCESS; }
API cuCtxSetCurrent(void* context) { return current = context, SUCCESS; }
API cuStreamSynchronize(void*) { return SUCCESS; }
API cuCtxSynchronize() { return SUCCESS; }

API cuModuleLoadData(void** module, const void* image) {
    if (!current)
        return INVALID_CONTEXT;
    const size_t bytes = elf_bytes(image);
    if (!bytes)
        return INVALID_IMAGE;
    *module = new Module{std::string((const char*)image, bytes)};
    return SUCCESS;
}
API cuModuleUnload(Module* module) { return delete module, SUCCESS; }
API cuModuleGetFunction(void** function, Module* module, const char* name) {
    const std::string whole = std::string(1, '\0') + name + '\0';  // as it stands in a table of strings
    if (module->image.find(whole) == std::string::npos)
        return NOT_FOUND;
    for (const Entry& entry : entries())
        if (!std::strcmp(entry.name, name))
            return *function = new Function{&entry}, SUCCESS;
    return NOT_FOUND;
}
API cuFuncSetAttribute(Function* function, int attribute, int value) {
    if (attribute == 8) {  // dynamic shared memory
        if (value < 0 || value > shared_memory())
            return INVALID_VALUE;
        function->smem = value;
    }
    return SUCCESS;
}
API cuFuncGetAttribute(int* value, int attribute, Function* function) {
    *value = attribute == 0 ? function->entry->threads : attribute == 8 ? function->smem : 0;
    return SUCCESS;
}
API cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned smem, void*, void** params, void**) {
    if (!current)
        return INVALID_CONTEXT;
    const Entry& entry = *function->entry;
    const uint64_t threads = (uint64_t)bx * by * bz, blocks = (uint64_t)gx * gy * gz;
    // A kernel of ours is written for exactly the threads of its bounds.
    if (threads != (uint64_t)entry.threads || !blocks || gx > 0x7fffffffu || gy > 65535 || gz > 65535 ||
        (int)smem > function->smem)
        return INVALID_VALUE;
    const uint64_t seed = std::strtoull(from_environment("LLAMA1M_FAKE_SEED", "1"), nullptr, 10);
    const int workers = blocks < 4 ? 1 : (int)std::min(4u, std::max(1u, std::thread::hardware_concurrency()));
    cpu::launch({gx, gy, gz}, {bx, by, bz}, smem, [&] { entry.call(params); }, mode(), seed, workers);
    return SUCCESS;
}

API cuTensorMapEncodeTiled(TensorMap* map, int type, uint32_t rank, void* base, const uint64_t* dim, const uint64_t* stride,
                           const uint32_t* box, const uint32_t* element_stride, int interleave, int swizzle, int, int) {
    return encode_tensor_map(map, type, rank, base, dim, stride, box, element_stride, interleave, swizzle) ? SUCCESS
                                                                                                           : INVALID_VALUE;
}

API cuGetErrorName(int status, const char** text) {
    switch (status) {
        case SUCCESS: *text = "CUDA_SUCCESS"; break;
        case INVALID_VALUE: *text = "CUDA_ERROR_INVALID_VALUE"; break;
        case INVALID_DEVICE: *text = "CUDA_ERROR_INVALID_DEVICE"; break;
        case INVALID_IMAGE: *text = "CUDA_ERROR_INVALID_IMAGE"; break;
        case INVALID_CONTEXT: *text = "CUDA_ERROR_INVALID_CONTEXT"; break;
        case NOT_FOUND: *text = "CUDA_ERROR_NOT_FOUND"; break;
        default: *text = "CUDA_ERROR_UNKNOWN";
    }
    return SUCCESS;
}
API cuGetErrorString(int status, const char** text) { return cuGetErrorName(status, text); }
