//! The kernels of `csrc/attention_backward_*.cu`, and the geometry of a block.

use super::kernels::{ByDtype, Kernel, by_dtype, kernel, tuned};
use crate::dtype::DType;
use crate::error::Result;

/// Rows of a block of the readable kernels.
pub const ANY_ROWS: usize = 16;
/// Queries of a block of the stats.
pub const STATS_ROWS: usize = 4;
const ANY_SMEM: u32 = 67_840;
/// What is known of each query before the sweeps.
pub static STATS: ByDtype = by_dtype!("backward_stats", "attention_backward_any.cu", 128, 0);
/// The readable sweep of keys.
pub static ANY_KEYS: ByDtype = by_dtype!("backward_keys", "attention_backward_any.cu", 128, ANY_SMEM);
/// The readable sweep of queries.
pub static ANY_QUERIES: ByDtype = by_dtype!("backward_queries", "attention_backward_any.cu", 128, ANY_SMEM);

/// A sweep: its kernel, and rows and columns of a step.
#[derive(Debug)]
pub struct Sweep {
    /// What is launched.
    pub kernel: &'static Kernel,
    /// Rows of a block.
    pub rows: usize,
    /// Columns of a step.
    pub columns: usize,
}

/// Bytes of shared memory of `attention_backward_sm80`; `own`: columns of a step that a warp computes.
const fn sm80_smem(head_dim: usize, rows: usize, own: usize) -> u32 {
    let share = head_dim / 64;
    let columns = own * share;
    let handed = if share > 1 { 2 * 2 * (own / 16) * 512 } else { 0 };
    (2 * rows * head_dim * 2 + 4 * columns * head_dim * 2 + 2 * columns * 8 + rows / 32 * share * handed) as u32
}
const WIDE_SMEM: u32 = sm80_smem(128, 128, 32);
const SMALL_SMEM: u32 = sm80_smem(128, 64, 16);

const fn sm80(entry: &'static str, threads: u32, smem: u32) -> Kernel {
    kernel(entry, "attention_backward_sm80.cu", threads, smem)
}

/// A sweep of `csrc/attention_backward_sm80.cu` for a dtype, a head_dim, and a GPU whose blocks get `smem` bytes.
///
/// # Errors
/// When there is none.
pub fn sm80_sweep(keys: bool, dtype: DType, head_dim: usize, smem: i32) -> Result<Sweep> {
    const NARROW: u32 = sm80_smem(64, 128, 32);
    static KEYS: [Kernel; 4] = [
        sm80("backward_keys_sm80_bf16_d64", 128, NARROW),
        sm80("backward_keys_sm80_bf16_d128", 256, WIDE_SMEM),
        sm80("backward_keys_sm80_f16_d64", 128, NARROW),
        sm80("backward_keys_sm80_f16_d128", 256, WIDE_SMEM),
    ];
    static QUERIES: [Kernel; 4] = [
        sm80("backward_queries_sm80_bf16_d64", 128, NARROW),
        sm80("backward_queries_sm80_bf16_d128", 256, WIDE_SMEM),
        sm80("backward_queries_sm80_f16_d64", 128, NARROW),
        sm80("backward_queries_sm80_f16_d128", 256, WIDE_SMEM),
    ];
    static SMALL: [Kernel; 4] = [
        sm80("backward_keys_sm80_bf16_d128_small", 128, SMALL_SMEM),
        sm80("backward_keys_sm80_f16_d128_small", 128, SMALL_SMEM),
        sm80("backward_queries_sm80_bf16_d128_small", 128, SMALL_SMEM),
        sm80("backward_queries_sm80_f16_d128_small", 128, SMALL_SMEM),
    ];
    let found = tuned(if keys { &KEYS } else { &QUERIES }, dtype, head_dim)?;
    if found.smem as i64 > i64::from(smem) {
        let small = &SMALL[2 * usize::from(!keys) + usize::from(dtype == DType::F16)];
        return Ok(Sweep { kernel: small, rows: 64, columns: 32 });
    }
    Ok(Sweep { kernel: found, rows: 128, columns: head_dim / 2 })
}

/// Columns of a step of `attention_backward_sm90`.
const fn sm90_columns(keys: bool, head_dim: usize) -> usize {
    if keys || head_dim == 128 { 64 } else { 128 }
}
const fn sm90(entry: &'static str, keys: bool, head_dim: usize) -> Kernel {
    let columns = sm90_columns(keys, head_dim);
    let smem = 2 * 128 * head_dim * 2 + 4 * (2 * columns * head_dim * 2 + columns * 8) + 128;
    kernel(entry, "attention_backward_sm90.cu", 384, smem as u32)
}

/// A sweep of `csrc/attention_backward_sm90.cu` for a dtype and head_dim.
///
/// # Errors
/// When there is none.
pub fn sm90_sweep(keys: bool, dtype: DType, head_dim: usize) -> Result<Sweep> {
    static KEYS: [Kernel; 4] = [
        sm90("backward_keys_sm90_bf16_d64", true, 64),
        sm90("backward_keys_sm90_bf16_d128", true, 128),
        sm90("backward_keys_sm90_f16_d64", true, 64),
        sm90("backward_keys_sm90_f16_d128", true, 128),
    ];
    static QUERIES: [Kernel; 4] = [
        sm90("backward_queries_sm90_bf16_d64", false, 64),
        sm90("backward_queries_sm90_bf16_d128", false, 128),
        sm90("backward_queries_sm90_f16_d64", false, 64),
        sm90("backward_queries_sm90_f16_d128", false, 128),
    ];
    let found = tuned(if keys { &KEYS } else { &QUERIES }, dtype, head_dim)?;
    Ok(Sweep { kernel: found, rows: 128, columns: sm90_columns(keys, head_dim) })
}

#[cfg(test)]
mod tests {
    use super::super::kernels::tests::source;
    use super::*;

    /// What the sources assert of themselves is what is launched.
    #[test]
    fn geometry_is_the_sources() {
        let says = |name: &str, words: String| assert!(source(name).contains(&words), "{name}: expected {words}");
        let any = "attention_backward_any.cu";
        says(any, format!("ROWS = {ANY_ROWS}, COLUMNS = {ANY_ROWS}, THREADS = {}", ANY_KEYS.f32.threads));
        says(any, format!("SMEM_BYTES == {ANY_SMEM},"));
        says(any, "WARPS = THREADS / 32,".into());
        assert_eq!(STATS_ROWS * 32, STATS.f32.threads as usize);
        for (head_dim, smem, small) in [(64, 1 << 20, false), (128, 1 << 20, false), (128, 99 << 10, true)] {
            for keys in [false, true] {
                let Sweep { kernel: k, rows, columns } = sm80_sweep(keys, DType::BF16, head_dim, smem).unwrap();
                let shape = format!("Shape<{head_dim}, {small}>");
                let same = format!("{shape}::THREADS == {} && {shape}::SMEM_BYTES == {},", k.threads, k.smem);
                says("attention_backward_sm80.cu", same);
                assert_eq!((rows, columns), if small { (64, 32) } else { (128, head_dim / 2) });
            }
        }
        for (keys, head_dim) in [(true, 64), (false, 64), (true, 128), (false, 128)] {
            let Sweep { kernel: k, rows, columns } = sm90_sweep(keys, DType::F16, head_dim).unwrap();
            let shape = format!("<{keys}, {head_dim}>");
            let same = format!("COLUMNS{shape} == {columns} && SMEM_BYTES{shape} == {},", k.smem);
            says("attention_backward_sm90.cu", same);
            says("attention_backward_sm90.cu", format!("ROWS == {rows} && THREADS == {},", k.threads));
        }
    }
}
