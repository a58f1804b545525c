//! The kernels: which source they are in, and the geometry of a block.

/// Sources that NVRTC compiles, one program each.
pub const SOURCES: &[(&str, &str)] = &[];

/// What they include, by name, in byte order of the names.
pub const HEADERS: &[(&str, &str)] = &[("params.h", include_str!("../../csrc/params.h"))];

/// An entry point of a source.
#[derive(Debug)]
pub struct Kernel {
    /// Its name, unmangled.
    pub entry: &'static str,
    /// The file it is in.
    pub source: &'static str,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub smem: u32,
}
