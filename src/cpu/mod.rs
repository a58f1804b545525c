//! The CPU engine: blockwise attention, decode, RoPE and merges over borrowed memory.
//!
//! `attention` (prefill, packed panels), `backward` (its gradients), `decode` (few rows, row-major), `kv`, `rope`, `merge`
//! are the verbs; `kernels`, `backward_block`, `rowwise`, `codes` and `compact` hold the arithmetic once, `arch/` compiles
//! it per instruction set, `isa` chooses at run time.

pub mod arch;
pub mod attention;
pub mod backward;
pub mod backward_block;
pub mod codes;
pub mod compact;
pub mod decode;
pub mod isa;
pub mod kernels;
pub mod kv;
pub mod merge;
mod openmp;
mod partials;
pub mod pool;
pub mod probe;
pub mod rope;
pub mod rowwise;
mod scratch;
pub mod vector;

/// What every verb is given besides its operands.
pub struct Context<'a> {
    /// Threads to use, the calling one included.
    pub threads: usize,
    /// Asked now and then on the calling thread; true stops the work with [`crate::Error::Interrupted`].
    pub poll: &'a dyn Fn() -> bool,
}

impl Context<'_> {
    /// A context that is never interrupted.
    pub fn new(threads: usize) -> Self {
        Self { threads: threads.max(1), poll: &|| false }
    }
}
