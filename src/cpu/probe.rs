//! The machine's own limits, measured for the bench: arithmetic in registers, and reading memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Context, isa, pool};
use crate::dtype::DType;
use crate::error::Result;

/// FLOP/s of independent multiply-adds in registers on `threads` threads together, in the operand type that attention
/// uses for `dtype` (bf16 dot products where the CPU has them, else float32), over about `time`.
///
/// # Errors
/// When the instruction set can't be chosen.
pub fn peak_flops(dtype: DType, threads: usize, time: Duration) -> Result<f64> {
    let kernel = (isa::active()?.kernels.peak)(dtype);
    let done = AtomicU64::new(0);
    let started = Instant::now();
    pool::run(&Context::new(threads), threads, 1, |_| {
        while started.elapsed() < time {
            // SAFETY: `active` chose kernels this CPU has.
            let flops = unsafe { kernel(20_000) };
            done.fetch_add(flops, Ordering::Relaxed);
        }
    })?;
    Ok(done.into_inner() as f64 / started.elapsed().as_secs_f64())
}

/// Reads every byte of `data` once on `threads` threads, in order within each share; returns the seconds it took.
///
/// # Errors
/// When threads can't be had.
pub fn read_seconds(data: &[u8], threads: usize) -> Result<f64> {
    const SHARE: usize = 1 << 20;
    let sum = AtomicU64::new(0);
    let started = Instant::now();
    pool::run(&Context::new(threads), data.len().div_ceil(SHARE), 1, |n| {
        let share = &data[n * SHARE..((n + 1) * SHARE).min(data.len())];
        sum.fetch_add(fold(share), Ordering::Relaxed);
    })?;
    std::hint::black_box(sum.into_inner());
    Ok(started.elapsed().as_secs_f64())
}

/// Folds all bytes with as many independent accumulators as keep the load ports busy.
fn fold(share: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: just detected.
        return unsafe { fold_avx512(share) };
    }
    let mut acc = [0u64; 32];
    for block in share.chunks_exact(256) {
        for (a, x) in acc.iter_mut().zip(block.chunks_exact(8)) {
            *a ^= u64::from_ne_bytes(x.try_into().expect("8 bytes"));
        }
    }
    acc.iter().fold(0, |a, x| a ^ x)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn fold_avx512(share: &[u8]) -> u64 {
    use std::arch::x86_64::*;
    let mut acc = [_mm512_setzero_si512(); 8];
    for block in share.chunks_exact(512) {
        for (i, a) in acc.iter_mut().enumerate() {
            // SAFETY: 64 bytes inside the block; a prefetch never faults.
            unsafe {
                let p = block.as_ptr().add(i * 64);
                _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(4096).cast());
                *a = _mm512_xor_si512(*a, _mm512_loadu_si512(p.cast()));
            }
        }
    }
    let all = acc.into_iter().fold(_mm512_setzero_si512(), |a, x| _mm512_xor_si512(a, x));
    _mm512_reduce_add_epi64(all) as u64
}
