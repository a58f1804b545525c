//! One file per instruction set: its vectors, and its kernels' entry points.
//!
//! [`instantiate!`] compiles the generic kernels under a `target_feature`; a new instruction set is a new file with a
//! `Vector` and one call of it, and one line in `isa.rs`.

use super::backward_block;
use super::codes::{Dequantize, Quantize};
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

/// The backward kernel of one instruction set and operand type.
#[derive(Clone, Copy)]
pub struct BackwardKernel {
    /// Register tiles.
    pub tiles: backward_block::Tiles,
    /// Elements in an operand unit.
    pub pair: usize,
    /// One block of rows against one block of keys.
    pub block: unsafe fn(&backward_block::Block),
    /// For q, k and v.
    pub own: Packs,
    /// For the gradient of the output.
    pub grad: Packs,
}

/// How rows of a dtype become operands of the backward kernel.
#[derive(Clone, Copy)]
pub struct Packs {
    /// `(rows, row_bytes, units, dst)`: a panel of rows, see `backward_block::pack_panel`.
    pub panel: unsafe fn(*const *const u8, usize, usize, *mut u32),
    /// `(rows, row_bytes, units, dst)`: a tile of keys, see `kernels::pack_k`.
    pub keys: unsafe fn(*const *const u8, usize, usize, *mut u32),
    /// `(rows, row_bytes, dp, dst)`: a block, see `backward_block::Gradient::pack_rows`.
    pub rows: unsafe fn(*const *const u8, usize, usize, *mut u32),
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
    /// The thirds of `block` apart, for blocks in which k or v is compact: see `rowwise`.
    pub scores: [unsafe fn(&Block); 4],
    /// Of dense v.
    pub values: [unsafe fn(&Block); 4],
    /// Of codes.
    pub codes: CodesKernel,
}

/// The decode kernel over codes, of one instruction set and operand type. By [`Codes`], then by rows.
#[derive(Clone, Copy)]
pub struct CodesKernel {
    /// See `compact::scores`.
    pub scores: [[unsafe fn(&Block); 4]; 3],
    /// See `rowwise::softmax`: for dense v, then for compact v.
    pub softmax: [[unsafe fn(&Block); 4]; 2],
    /// See `compact::values`.
    pub values: [[unsafe fn(&Block); 4]; 3],
    /// Which of 64 channels lane `lane` of accumulator `i` holds.
    pub order: [fn(usize, usize) -> usize; 3],
}

/// Everything an instruction set offers.
#[derive(Clone, Copy)]
pub struct Kernels {
    /// Prefill kernel for inputs of a dtype.
    pub panel: fn(DType) -> PanelKernel,
    /// Decode kernel for inputs of a dtype.
    pub rows: fn(DType) -> RowsKernel,
    /// Backward kernel for inputs of a dtype and the gradient of the output in another.
    pub backward: fn(DType, DType) -> BackwardKernel,
    /// See `backward_block::dot`.
    pub dot: unsafe fn(*const u8, DType, *const u8, DType, usize) -> f32,
    /// See `rope::rotate_rows`.
    pub rotate: unsafe fn(&super::rope::Rotation),
    /// `acc += w * x` over rows: see `merge::accumulate`.
    pub accumulate: unsafe fn(*mut f32, *const u8, DType, f32, usize),
    /// `(o, factor, n, dtype, dst)`: scales a float32 row and writes it in a dtype.
    pub finish: unsafe fn(*const f32, f32, usize, DType, *mut u8),
    /// Codes to dense rows.
    pub dequantize: unsafe fn(&Dequantize),
    /// Dense rows to codes.
    pub quantize: unsafe fn(&Quantize),
    /// Runs the given number of rounds of 24 independent multiply-adds in registers; returns the FLOP done.
    pub peak: fn(DType) -> unsafe fn(usize) -> u64,
}

/// One entry point for each number of rows R (1, 2, 4, 8), with KT = 16 / R and RP = R but at most 4, as `NAME::ALL`.
macro_rules! per_rows {
    (#[$feat:meta] $name:ident: $r:ident, $kt:ident, $rp:ident => $call:expr) => {
        mod $name {
            use super::*;
            per_rows!(@one #[$feat] rows1 $r 1 $kt 16 $rp 1 $call);
            per_rows!(@one #[$feat] rows2 $r 2 $kt 8 $rp 2 $call);
            per_rows!(@one #[$feat] rows4 $r 4 $kt 4 $rp 4 $call);
            per_rows!(@one #[$feat] rows8 $r 8 $kt 2 $rp 4 $call);
            pub(super) const ALL: [unsafe fn(&rowwise::Block); 4] = [rows1, rows2, rows4, rows8];
        }
    };
    (@one #[$feat:meta] $name:ident $r:ident $rv:literal $kt:ident $ktv:literal $rp:ident $rpv:literal $call:expr) => {
        #[$feat]
        unsafe fn $name(a: &rowwise::Block) {
            #[allow(dead_code)] // not every kernel asks for all three
            const $r: usize = $rv;
            #[allow(dead_code)]
            const $kt: usize = $ktv;
            #[allow(dead_code)]
            const $rp: usize = $rpv;
            // SAFETY: forwarded.
            unsafe { $call(a) }
        }
    };
}
use per_rows;

/// Entry points of the kernels under a set of target features.
///
/// `panel NAME: Dot, R, C, T, PR, PC`, `backward NAME: Dot, M, C, R, W, T, how each dtype is loaded`, `codes NAME: Dot` and `rows NAME: Rows, PC for each of 1, 2, 4, 8 rows; NAME of codes`.
macro_rules! instantiate {
    (
        #[$feat:meta];
        vector $v:ty;
        $(panel $pname:ident: $dot:ty, load $load:ty, $r:literal x $c:literal, tiles $t:literal, pv $pr:literal x $pc:literal;)*
        $(backward $bname:ident: $bdot:ty, $bm:literal x $bc:literal, sums $br:literal x $bw:literal x $bt:literal, packs $($lname:ident $lload:ty),*;)*
        codes $cname:ident: $cdot:ty;
        $(rows $rname:ident: $rows:ty, pv $pc1:literal, $pc2:literal, $pc4:literal, $pc8:literal;)*
    ) => {
        pub(super) mod $cname {
            use super::*;
            use crate::cpu::codes::{Codewise, Fp8, Int4, Int8};
            use crate::cpu::compact;
            per_rows!(#[$feat] softmax_units: R, KT, RP => rowwise::softmax::<$cdot, R, true>);
            per_rows!(#[$feat] softmax_numbers: R, KT, RP => rowwise::softmax::<$cdot, R, false>);
            per_rows!(#[$feat] scores_int8: R, KT, RP => compact::scores::<$cdot, Int8, R>);
            per_rows!(#[$feat] scores_int4: R, KT, RP => compact::scores::<$cdot, Int4, R>);
            per_rows!(#[$feat] scores_fp8: R, KT, RP => compact::scores::<$cdot, Fp8, R>);
            per_rows!(#[$feat] values_int8: R, KT, RP => compact::values::<$cdot, Int8, R, RP>);
            per_rows!(#[$feat] values_int4: R, KT, RP => compact::values::<$cdot, Int4, R, RP>);
            per_rows!(#[$feat] values_fp8: R, KT, RP => compact::values::<$cdot, Fp8, R, RP>);
            pub(in super::super) const KERNEL: CodesKernel = CodesKernel {
                scores: [scores_int8::ALL, scores_int4::ALL, scores_fp8::ALL],
                softmax: [softmax_units::ALL, softmax_numbers::ALL],
                values: [values_int8::ALL, values_int4::ALL, values_fp8::ALL],
                order: [
                    <$cdot as Codewise<Int8>>::order,
                    <$cdot as Codewise<Int4>>::order,
                    <$cdot as Codewise<Fp8>>::order,
                ],
            };
        }
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
            pub(super) mod $bname {
                use super::*;
                const LANES: usize = <$v as Vector>::LANES;
                const TILES: Tiles =
                    Tiles { rows: $bm, keys: $bc * LANES, width: $bw * LANES, multiple: $bt * LANES };
                // Blocks are whole panels and whole tiles; pairs of rows stay within a panel.
                const _: () = assert!($bm >= 4 && $bm % 2 == 0 && SIDE % $bm == 0 && SIDE % TILES.keys == 0);
                const _: () = assert!(SIDE % $br == 0 && $bw % $bt == 0 && TILES.multiple / 2 % LANES == 0);
                #[$feat]
                unsafe fn block(a: &backward_block::Block) {
                    // SAFETY: forwarded, here and below.
                    unsafe { backward_block::block::<$bdot, $bm, $bc, $br, $bw, $bt>(a) }
                }
                $(
                    pub(in super::super) mod $lname {
                        use super::*;
                        #[$feat]
                        unsafe fn panel(rows: *const *const u8, bytes: usize, units: usize, dst: *mut u32) {
                            unsafe { backward_block::pack_panel::<$v, $lload, $bm>(rows, bytes, units, dst) }
                        }
                        #[$feat]
                        unsafe fn keys(rows: *const *const u8, bytes: usize, units: usize, dst: *mut u32) {
                            unsafe { kernels::pack_k::<$v, $lload>(rows, TILES.keys, bytes, units, dst) }
                        }
                        #[$feat]
                        unsafe fn rows(rows: *const *const u8, bytes: usize, dp: usize, dst: *mut u32) {
                            unsafe { <$bdot as Gradient>::pack_rows::<$lload>(rows, bytes, dp, TILES.width, dst) }
                        }
                        pub const PACKS: Packs = Packs { panel, keys, rows };
                    }
                )*
                pub(in super::super) const fn kernel(own: Packs, grad: Packs) -> BackwardKernel {
                    BackwardKernel { tiles: TILES, pair: <$bdot as Dot>::PAIR, block, own, grad }
                }
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
                per_rows!(#[$feat] scores: R, KT, RP => rowwise::scores::<$rows, R, KT>);
                #[$feat]
                unsafe fn values1(a: &rowwise::Block) {
                    unsafe { rowwise::values::<$rows, 1, $pc1>(a) }
                }
                #[$feat]
                unsafe fn values2(a: &rowwise::Block) {
                    unsafe { rowwise::values::<$rows, 2, $pc2>(a) }
                }
                #[$feat]
                unsafe fn values4(a: &rowwise::Block) {
                    unsafe { rowwise::values::<$rows, 4, $pc4>(a) }
                }
                #[$feat]
                unsafe fn values8(a: &rowwise::Block) {
                    unsafe { rowwise::values::<$rows, 8, $pc8>(a) }
                }
                pub(in super::super) const KERNEL: RowsKernel = RowsKernel {
                    lanes: <$v as Vector>::LANES,
                    pair: <$rows as Dot>::PAIR,
                    block: [rows1, rows2, rows4, rows8],
                    order: <$rows as Rows>::order,
                    scores: scores::ALL,
                    values: [values1, values2, values4, values8],
                    codes: super::$cname::KERNEL,
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
        #[$feat]
        pub(super) unsafe fn dequantize(a: &codes::Dequantize) {
            unsafe { codes::dequantize::<$v>(a) }
        }
        #[$feat]
        pub(super) unsafe fn quantize(a: &codes::Quantize) {
            unsafe { codes::quantize::<$v>(a) }
        }
        #[$feat]
        pub(super) unsafe fn dot(a: *const u8, a_dtype: DType, b: *const u8, b_dtype: DType, n: usize) -> f32 {
            unsafe { backward_block::dot::<$v>(a, a_dtype, b, b_dtype, n) }
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
            backward: |own, grad| {
                let packs = |dtype| match dtype {
                    DType::F32 => base::gradients::f32::PACKS,
                    DType::BF16 => base::gradients::bf16::PACKS,
                    DType::F16 => base::gradients::f16::PACKS,
                };
                base::gradients::kernel(packs(own), packs(grad))
            },
            dot: base::dot,
            rotate: base::rotate,
            accumulate: base::accumulate,
            finish: base::finish,
            dequantize: base::dequantize,
            quantize: base::quantize,
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
