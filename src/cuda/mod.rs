//! The CUDA engine: the same verbs as `cpu` on NVIDIA GPUs, sm_80 and newer.
//!
//! Kernels are in `csrc/`; `kernels` says which there are, `cubin` where their machine code comes from, `launch` gives them
//! to torch's stream. All memory is torch's; nothing here allocates on a device or waits for one.

pub mod attention;
pub mod backward;
pub mod backward_kernels;
pub mod cubin;
pub mod decode;
pub mod driver;
pub mod kernels;
pub mod kv;
pub mod launch;
pub mod merge;
pub mod nvrtc;
pub mod params;
pub mod rope;
pub mod tensor_map;
pub mod views;
