//! One file per instruction set: its vectors, and its kernels' entry points.
//!
//! [`instantiate!`] compiles the generic kernels under a `target_feature`; a new instruction set is a new file with a
//! `Vector` and one call of it, and one line in `isa.rs`.

use super::kernels::Panel;
use super::rowwise::Block;
use crate::dtype::DType;

pub mod portable;

#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
#[cfg(target_arch = "aarch64")]
pub mod neon;

/// Asks for `bytes` bytes from `p` on to come into the second-level cache; never faults, does nothing where unsupported.
#[inline(always)]
pub fn prefetch(p: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..bytes).step_by(64) {
        // SAFETY: SSE is part of x86-64, and a prefetch of any address is harmless.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(p.wrapping_add(line).cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (p, bytes);
}

/// The prefill kernel of one instruction set and operand type.
#[derive(Clone, Copy)]
pub struct PanelKernel {
    /// Rows of a panel.
    pub rows: usize,
    /// Keys of a block.
    pub keys: usize,
    /// Elements in an operand unit.
    pub pair: usize,
    /// head_dim is padded to a multiple of this.
    pub multiple: usize,
    /// Lanes of a vector.
    pub lanes: usize,
    /// One panel against one block.
    pub panel: unsafe fn(&Panel),
    /// `(rows, row_bytes, units, dst)`: see `kernels::pack_k`.
    pub pack_k: unsafe fn(*const *const u8, usize, usize, *mut u32),
    /// `(rows, row_bytes, dp, dst)`: see `kernels::pack_v`.
    pub pack_v: unsafe fn(*const *const u8, usize, usize, *mut u32),
    /// `(o, 1 / l, n, dtype, dst)`: see `kernels::finish_row`.
    pub finish: unsafe fn(*const f32, f32, usize, DType, *mut u8),
}

/// The decode kernel of one instruction set and dtype.
#[derive(Clone, Copy)]
pub struct RowsKernel {
    /// Lanes of a vector.
    pub lanes: usize,
    /// Elements in an operand unit.
    pub pair: usize,
    /// Kernels for 1, 2, 4 and 8 rows.
    pub block: [unsafe fn(&Block); 4],
    /// Element of the chunk that lane `lane` of accumulator `i` holds.
    pub order: fn(usize, usize) -> usize,
}

/// Everything an instruction set offers.
#[derive(Clone, Copy)]
pub struct Kernels {
    /// Prefill kernel for inputs of a dtype.
    pub panel: fn(DType) -> PanelKernel,
    /// Decode kernel for inputs of a dtype.
    pub rows: fn(DType) -> RowsKernel,
    /// See `rope::rotate_rows`.
    pub rotate: unsafe fn(&super::rope::Rotation),
    /// `acc += w * x` over rows: see `merge::accumulate`.
    pub accumulate: unsafe fn(*mut f32, *const u8, DType, f32, usize),
    /// `(o, factor, n, dtype, dst)`: scales a float32 row and writes it in a dtype.
    pub finish: unsafe fn(*const f32, f32, usize, DType, *mut u8),
    /// Runs the given number of rounds of 24 independent multiply-adds in registers; returns the FLOP done.
    pub peak: fn(DType) -> unsafe fn(usize) -> u64,
}

/// Entry points of the kernels under a set of target features.
///
/// `panel NAME: Dot, R, C, T, PR, PC` and `rows NAME: Rows, PC for each of 1, 2, 4, 8 rows`.
macro_rules! instantiate {
    (
        #[$feat:meta];
        vector $v:ty;
        $(panel $pname:ident: $dot:ty, load $load:ty, $r:literal x $c:literal, tiles $t:literal, pv $pr:literal x $pc:literal;)*
        $(rows $rname:ident: $rows:ty, pv $pc1:literal, $pc2:literal, $pc4:literal, $pc8:literal;)*
    ) => {
        $(
            pub(super) mod $pname {
                use super::*;
                const KEYS: usize = $c * $t * <$v as Vector>::LANES;
                const PAIR: usize = <$dot as Dot>::PAIR;
                // Several tiles a block keep float32 probabilities waiting in p; PV tiles cut a panel evenly.
                const _: () = assert!((PAIR == 1 || $t == 1) && $r % $pr == 0 && KEYS % <$v as Vector>::LANES == 0);
                #[$feat]
                unsafe fn panel(a: &kernels::Panel) {
                    // SAFETY: forwarded, here and below.
                    unsafe { kernels::panel::<$dot, $r, $c, $t, $pr, $pc>(a) }
                }
                #[$feat]
                unsafe fn pack_k(rows: *const *const u8, bytes: usize, units: usize, dst: *mut u32) {
                    unsafe { kernels::pack_k::<$v, $load>(rows, KEYS, bytes, units, dst) }
                }
                #[$feat]
                unsafe fn pack_v(rows: *const *const u8, bytes: usize, dp: usize, dst: *mut u32) {
                    unsafe { <$dot as PackV>::pack_v::<$load>(rows, KEYS, bytes, dp, dst) }
                }
                pub(in super::super) const KERNEL: PanelKernel = PanelKernel {
                    rows: $r,
                    keys: KEYS,
                    pair: PAIR,
                    multiple: $pc * <$v as Vector>::LANES,
                    lanes: <$v as Vector>::LANES,
                    panel,
                    pack_k,
                    pack_v,
                    finish: super::finish,
                };
            }
        )*
        $(
            pub(super) mod $rname {
                use super::*;
                #[$feat]
                unsafe fn rows1(a: &rowwise::Block) {
                    // SAFETY: forwarded, here and below.
                    unsafe { rowwise::block::<$rows, 1, 16, $pc1>(a) }
                }
                #[$feat]
                unsafe fn rows2(a: &rowwise::Block) {
                    unsafe { rowwise::block::<$rows, 2, 8, $pc2>(a) }
                }
                #[$feat]
                unsafe fn rows4(a: &rowwise::Block) {
                    unsafe { rowwise::block::<$rows, 4, 4, $pc4>(a) }
                }
                #[$feat]
                unsafe fn rows8(a: &rowwise::Block) {
                    unsafe { rowwise::block::<$rows, 8, 2, $pc8>(a) }
                }
                pub(in super::super) const KERNEL: RowsKernel = RowsKernel {
                    lanes: <$v as Vector>::LANES,
                    pair: <$rows as Dot>::PAIR,
                    block: [rows1, rows2, rows4, rows8],
                    order: <$rows as Rows>::order,
                };
            }
        )*
        #[$feat]
        pub(super) unsafe fn finish(o: *const f32, inv: f32, n: usize, dtype: DType, dst: *mut u8) {
            // SAFETY: forwarded, here and below.
            unsafe { kernels::finish_row::<$v>(o, inv, n, dtype, dst) }
        }
    };
}
use instantiate;

/// Entry points that don't depend on the operand type.
macro_rules! instantiate_common {
    (#[$feat:meta]; vector $v:ty;) => {
        #[$feat]
        pub(super) unsafe fn rotate(a: &rope::Rotation) {
            // SAFETY: forwarded, here and below.
            unsafe { rope::rotate_rows::<$v>(a) }
        }
        #[$feat]
        pub(super) unsafe fn accumulate(acc: *mut f32, x: *const u8, dtype: DType, w: f32, n: usize) {
            unsafe { merge::accumulate::<$v>(acc, x, dtype, w, n) }
        }
    };
}
use instantiate_common;

/// The table of a level whose `base` module has a float32 kernel for each dtype.
macro_rules! table {
    (peak $peak:expr) => {
        Kernels {
            panel: |dtype| match dtype {
                DType::F32 => base::f32::KERNEL,
                DType::BF16 => base::bf16::KERNEL,
                DType::F16 => base::f16::KERNEL,
            },
            rows: |dtype| match dtype {
                DType::F32 => base::f32_rows::KERNEL,
                DType::BF16 => base::bf16_rows::KERNEL,
                DType::F16 => base::f16_rows::KERNEL,
            },
            rotate: base::rotate,
            accumulate: base::accumulate,
            finish: base::finish,
            peak: $peak,
        }
    };
}
use table;

/// How v is packed for an operand type.
pub(super) trait PackV {
    /// See `kernels::pack_v`; for pairs `[keys / 2][dp]` units of two neighbouring keys.
    unsafe fn pack_v<L: super::vector::Load<Self::Vec>>(
        rows: *const *const u8,
        keys: usize,
        bytes: usize,
        dp: usize,
        dst: *mut u32,
    ) where
        Self: Sized;
    /// The vector type.
    type Vec: super::vector::Vector;
}

impl<V: super::vector::Vector> PackV for super::vector::Float<V> {
    type Vec = V;
    #[inline(always)]
    unsafe fn pack_v<L: super::vector::Load<V>>(
        rows: *const *const u8,
        keys: usize,
        bytes: usize,
        dp: usize,
        dst: *mut u32,
    ) {
        // SAFETY: forwarded.
        unsafe { super::kernels::pack_v::<V, L>(rows, keys, bytes, dp, dst) }
    }
}
