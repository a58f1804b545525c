//! Long-context attention for Llama: the core of `llama1m_ext`.
//!
//! Floors, imports pointing downward only:
//!
//! ```text
//! door         py            pyo3: tensors come in, errors go out (feature `python`)
//! operations   attention     check once, choose the kernel
//!              ring          many devices: who holds which positions, in which order blocks travel
//! engines      cpu cuda      attention_forward, attention_decode, attention_backward, kv_append, kv_read, rope_apply, merge_partials
//! mathematics  args gradients shapes softmax tiling rope quant reference
//! words        error dtype tensor
//! ```
//!
//! Vocabulary: q, k, v are `[batch, heads, len, head_dim]`; `group = q_heads / kv_heads`; a *block* is a tile of
//! computation, a *page* a unit of KV storage, a *chunk* a run of queries in prefill; a *partial* is `(out, lse)` over
//! some keys, and partials are *merged*. The core owns no tensor: it computes over borrowed memory and returns.

pub mod args;
pub mod attention;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dtype;
pub mod error;
pub mod gradients;
#[cfg(feature = "python")]
mod py;
pub mod quant;
pub mod reference;
pub mod ring;
pub mod rope;
pub mod shapes;
pub mod softmax;
pub mod tensor;
pub mod tiling;

pub use args::{AttnArgs, KvRef, Side};
pub use cpu::Context;
pub use dtype::DType;
pub use error::{Error, Result};
pub use gradients::BackwardArgs;
pub use tensor::{TensorMut, TensorRef};
