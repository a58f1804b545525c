//! AVX-512 (F, BW, DQ, VL): 16 lanes; and its BF16 dot products (VDPBF16PS), 32 multiply-adds an instruction.

#![allow(clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)] // one contract: vector.rs
#![allow(unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)] // rows and columns of a register tile are indices

use std::arch::x86_64::*;

use super::{
    BackwardKernel, CodesKernel, Kernels, PackV, Packs, PanelKernel, RowsKernel, instantiate, instantiate_common,
    per_rows, table,
};
use crate::cpu::backward_block::{Gradient, SIDE, Tiles, place};
use crate::cpu::codes::{Code, Codewise, Fp8, Int4, Int8};
use crate::cpu::rowwise::{FloatRows, Rows};
use crate::cpu::vector::{Bf16, Dot, F16, Float, Load, MAX_LANES, Raw, Vector};
use crate::cpu::{backward_block, codes, compact, kernels, merge, rope, rowwise};
use crate::dtype::DType;

/// 16 float32.
#[derive(Clone, Copy)]
pub struct V(__m512);

unsafe impl Vector for V {
    const LANES: usize = 16;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self(_mm512_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Self(_mm512_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        _mm512_storeu_ps(p, self.0);
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        Self(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast())))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16) {
        // By hand: VCVTNEPS2BF16 would flush subnormals, and plain AVX-512 lacks it.
        let x = _mm512_castps_si512(self.0);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(x), _mm512_set1_epi32(1));
        let r = _mm512_srli_epi32::<16>(_mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
        let q = _mm512_or_si512(_mm512_srli_epi32::<16>(x), _mm512_set1_epi32(0x40));
        _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, nan, q)));
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16) {
        _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0));
    }
    #[inline(always)]
    unsafe fn add(self, o: Self) -> Self {
        Self(_mm512_add_ps(self.0, o.0))
    }
    #[inline(always)]
    unsafe fn mul(self, o: Self) -> Self {
        Self(_mm512_mul_ps(self.0, o.0))
    }
    #[inline(always)]
    unsafe fn max(self, o: Self) -> Self {
        Self(_mm512_max_ps(self.0, o.0))
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        Self(_mm512_fmadd_ps(self.0, b.0, c.0))
    }
    #[inline(always)]
    unsafe fn mul_sub(self, b: Self, c: Self) -> Self {
        Self(_mm512_fmsub_ps(self.0, b.0, c.0))
    }
    #[inline(always)]
    unsafe fn exp2(self) -> Self {
        // Round to nearest, degree-6 minimax (2e-9), VSCALEFPS: which also maps (NaN, -inf) to 0.
        let n = _mm512_roundscale_ps::<0x08>(self.0);
        let f = _mm512_sub_ps(self.0, n);
        let mut p = _mm512_set1_ps(1.534_581_2e-4);
        for c in [1.339_993_1e-3, 9.618_489e-3, 5.550_328_8e-2, 2.402_264_7e-1, 6.931_472e-1, 1.0] {
            p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
        }
        Self(_mm512_scalef_ps(p, n))
    }
    #[inline(always)]
    unsafe fn exp2_bf16(self) -> Self {
        // VREDUCEPS gives x - floor(x) in one step and VSCALEFPS takes the floor itself; cubic minimax (7.5e-5).
        let f = _mm512_reduce_ps::<0x09>(self.0);
        let mut p = _mm512_set1_ps(7.802_453e-2);
        for c in [2.260_671_5e-1, 6.958_335_4e-1, 9.999_252e-1] {
            p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
        }
        Self(_mm512_scalef_ps(p, self.0))
    }
    #[inline(always)]
    unsafe fn keep_below(self, first: i32, hi: i32) -> Self {
        let lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let k = _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(hi - first));
        Self(_mm512_mask_blend_ps(k, _mm512_set1_ps(f32::NEG_INFINITY), self.0))
    }
    #[inline(always)]
    unsafe fn any_gt(self, x: f32) -> bool {
        _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, _mm512_set1_ps(x)) != 0
    }
    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        _mm512_reduce_max_ps(self.0)
    }
    #[inline(always)]
    unsafe fn reduce_add(self) -> f32 {
        _mm512_reduce_add_ps(self.0)
    }
    #[inline(always)]
    unsafe fn transpose(m: &mut [Self; MAX_LANES]) {
        let mut r = [_mm512_setzero_si512(); 16];
        let mut t = r;
        for i in 0..16 {
            r[i] = _mm512_castps_si512(m[i].0);
        }
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..4 {
            r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        for i in 0..4 {
            t[i] = _mm512_shuffle_i32x4::<0x88>(r[i], r[4 + i]);
            t[4 + i] = _mm512_shuffle_i32x4::<0xdd>(r[i], r[4 + i]);
            t[8 + i] = _mm512_shuffle_i32x4::<0x88>(r[8 + i], r[12 + i]);
            t[12 + i] = _mm512_shuffle_i32x4::<0xdd>(r[8 + i], r[12 + i]);
        }
        for i in 0..4 {
            r[i] = _mm512_shuffle_i32x4::<0x88>(t[i], t[8 + i]);
            r[8 + i] = _mm512_shuffle_i32x4::<0xdd>(t[i], t[8 + i]);
            r[4 + i] = _mm512_shuffle_i32x4::<0x88>(t[4 + i], t[12 + i]);
            r[12 + i] = _mm512_shuffle_i32x4::<0xdd>(t[4 + i], t[12 + i]);
        }
        for i in 0..16 {
            m[i].0 = _mm512_castsi512_ps(r[i]);
        }
    }
    #[inline(always)]
    unsafe fn sum16(v: &[Self; 16], out: *mut f32) {
        // A transpose that adds on the way: 45 operations for 16 sums.
        let mut a = [_mm512_setzero_ps(); 8];
        for i in 0..8 {
            let (x, y) = (v[2 * i].0, v[2 * i + 1].0);
            a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
        }
        let mut b = [_mm512_setzero_ps(); 4];
        for i in 0..4 {
            let (x, y) = (_mm512_castps_pd(a[2 * i]), _mm512_castps_pd(a[2 * i + 1]));
            b[i] =
                _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
        }
        let c = |x, y| _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(x, y), _mm512_shuffle_f32x4::<0xdd>(x, y));
        let (x, y) = (c(b[0], b[1]), c(b[2], b[3]));
        _mm512_storeu_ps(out, c(x, y));
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))))
    }
    #[inline(always)]
    unsafe fn load_low4(p: *const u8) -> Self {
        // VPERMPS looks at the low 4 bits of each lane only: spreading the bytes is all there is to do.
        Self(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())), four_bits()))
    }
    #[inline(always)]
    unsafe fn load_high4(p: *const u8) -> Self {
        let x = _mm512_srli_epi32::<4>(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())));
        Self(_mm512_permutexvar_ps(x, four_bits()))
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        e4m3(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn unit_i8(p: *const u8, i: usize) -> Self {
        let x = _mm512_loadu_si512(p.cast());
        let x = _mm512_sll_epi32(x, _mm_cvtsi32_si128(24 - 8 * i as i32));
        Self(_mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(x)))
    }
    #[inline(always)]
    unsafe fn unit_e4m3(p: *const u8, i: usize) -> Self {
        let x = _mm512_loadu_si512(p.cast());
        e4m3(_mm512_srai_epi32::<24>(_mm512_sll_epi32(x, _mm_cvtsi32_si128(24 - 8 * i as i32))))
    }
    #[inline(always)]
    unsafe fn unit_low4(p: *const u8, shift: u32) -> Self {
        let x = _mm512_srl_epi32(_mm512_loadu_si512(p.cast()), _mm_cvtsi32_si128(shift as i32));
        Self(_mm512_permutexvar_ps(x, four_bits()))
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
}

/// Sign-extended e4m3 to float32.
#[inline(always)]
unsafe fn e4m3(x: __m512i) -> V {
    let magnitude = _mm512_slli_epi32::<20>(_mm512_and_si512(x, _mm512_set1_epi32(0x7f)));
    let normal = _mm512_castsi512_ps(_mm512_add_epi32(magnitude, _mm512_set1_epi32(120 << 23)));
    let small = _mm512_castsi512_ps(_mm512_add_epi32(magnitude, _mm512_set1_epi32(121 << 23)));
    let is_small = _mm512_testn_epi32_mask(x, _mm512_set1_epi32(0x78));
    let y = _mm512_mask_sub_ps(normal, is_small, small, _mm512_set1_ps(0.015_625));
    V(_mm512_or_ps(y, _mm512_and_ps(_mm512_castsi512_ps(x), _mm512_set1_ps(-0.0))))
}

#[inline(always)]
unsafe fn four_bits() -> __m512 {
    _mm512_setr_ps(-8., -7., -6., -5., -4., -3., -2., -1., 0., 1., 2., 3., 4., 5., 6., 7.)
}

/// Pairs of bf16, accumulated in float32.
pub struct Pairs;

#[inline(always)]
fn bh(x: __m512i) -> __m512bh {
    // SAFETY: both are 64 plain bytes.
    unsafe { std::mem::transmute(x) }
}

unsafe impl Dot for Pairs {
    type V = V;
    type B = __m512bh;
    const PAIR: usize = 2;
    #[inline(always)]
    unsafe fn splat(p: *const u32) -> __m512bh {
        bh(_mm512_set1_epi32(p.cast::<i32>().read_unaligned()))
    }
    #[inline(always)]
    unsafe fn load(p: *const u32) -> __m512bh {
        bh(_mm512_loadu_si512(p.cast()))
    }
    #[inline(always)]
    unsafe fn dot(acc: V, a: __m512bh, b: __m512bh) -> V {
        V(_mm512_dpbf16_ps(acc.0, a, b))
    }
    #[inline(always)]
    unsafe fn exp2(x: V) -> V {
        x.exp2_bf16()
    }
    #[inline(always)]
    unsafe fn put_p<const C: usize>(row: &[V; C], p: *mut u32, mut l: V) -> V {
        // l by a dot product with ones: it sums what was rounded, and costs less than adding the float32s.
        let ones = bh(_mm512_set1_epi32(0x3f80_3f80));
        for c in (0..C).step_by(2) {
            let x = _mm512_cvtne2ps_pbh(row[c + 1].0, row[c].0);
            let bits: __m512i = std::mem::transmute(x);
            _mm512_storeu_si512(p.add(c / 2 * 16).cast(), bits);
            l = V(_mm512_dpbf16_ps(l.0, x, ones));
        }
        l
    }
}

impl PackV for Pairs {
    type Vec = V;
    #[inline(always)]
    unsafe fn pack_v<L: Load<V>>(rows: *const *const u8, keys: usize, bytes: usize, dp: usize, dst: *mut u32) {
        for j in (0..keys).step_by(2) {
            let (a, b) = (*rows.add(j), *rows.add(j + 1));
            for d in (0..dp).step_by(16) {
                let x = _mm512_or_si512(half_row(a, d * 2, bytes), _mm512_slli_epi32::<16>(half_row(b, d * 2, bytes)));
                _mm512_storeu_si512(dst.add(j / 2 * dp + d).cast(), x);
            }
        }
    }
}

unsafe impl Gradient for Pairs {
    #[inline(always)]
    unsafe fn put_rows<const C: usize>(x: &[V; C], y: &[V; C], p: *mut u32) {
        for c in 0..C {
            // VCVTNE2PS2BF16 leaves x in the low half and y in the high one: VPERMW makes them neighbours.
            let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(y[c].0, x[c].0));
            _mm512_storeu_si512(p.add(c * 16).cast(), _mm512_permutexvar_epi16(zip(), both));
        }
    }
    #[inline(always)]
    unsafe fn put_keys<const C: usize>(x: &[V; C], p: *mut u32) {
        for c in 0..C {
            let bits: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(x[c].0));
            _mm256_storeu_si256(p.add(c * 8).cast(), bits);
        }
    }
    #[inline(always)]
    unsafe fn pack_rows<L: Load<V>>(rows: *const *const u8, bytes: usize, dp: usize, width: usize, dst: *mut u32) {
        for j in (0..SIDE).step_by(2) {
            let (a, b) = (*rows.add(j), *rows.add(j + 1));
            for d in (0..dp).step_by(16) {
                let x = _mm512_or_si512(half_row(a, d * 2, bytes), _mm512_slli_epi32::<16>(half_row(b, d * 2, bytes)));
                _mm512_storeu_si512(dst.add(place(d, j / 2, SIDE / 2, dp, width)).cast(), x);
            }
        }
    }
}

/// Word 2 i from the low half, word 2 i + 1 from the high one.
#[inline(always)]
unsafe fn zip() -> __m512i {
    const ORDER: [u16; 32] = {
        let mut order = [0; 32];
        let mut i = 0;
        while i < 16 {
            order[2 * i] = i as u16;
            order[2 * i + 1] = 16 + i as u16;
            i += 1;
        }
        order
    };
    _mm512_loadu_si512(ORDER.as_ptr().cast())
}

/// 16 bf16 of a row (null = zeros) of `bytes` bytes from byte `at` on, each in the low half of a unit; zeros beyond the row.
#[inline(always)]
unsafe fn half_row(row: *const u8, at: usize, bytes: usize) -> __m512i {
    if row.is_null() || at >= bytes {
        return _mm512_setzero_si512();
    }
    let lanes = ((bytes - at) / 2).min(16);
    let x = if lanes == 16 {
        _mm256_loadu_si256(row.add(at).cast())
    } else {
        _mm256_maskz_loadu_epi16((1u16 << lanes) - 1, row.add(at).cast())
    };
    _mm512_cvtepu16_epi32(x)
}

unsafe impl Rows for Pairs {
    const CHUNK_BYTES: usize = 64;
    const CHUNK: usize = 32;
    #[inline(always)]
    unsafe fn load_k(p: *const u8) -> __m512bh {
        bh(_mm512_loadu_si512(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_v(a: *const u8, b: *const u8) -> [__m512bh; 2] {
        let (x, y) = (_mm512_loadu_si512(a.cast()), _mm512_loadu_si512(b.cast()));
        [bh(_mm512_unpacklo_epi16(x, y)), bh(_mm512_unpackhi_epi16(x, y))]
    }
    fn order(i: usize, lane: usize) -> usize {
        lane / 4 * 8 + i * 4 + lane % 4
    }
}

/// Both halves of the table -8..=7 in bf16: VPERMW looks at 5 bits, of which the fifth belongs to another code.
#[inline(always)]
unsafe fn four_bits_bf16() -> __m512i {
    const T: [u16; 16] = [
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
        0x40c0, 0x40e0,
    ];
    _mm512_broadcast_i64x4(_mm256_loadu_si256(T.as_ptr().cast()))
}

/// 32 words of sign-extended e4m3 to bf16.
#[inline(always)]
unsafe fn e4m3_bf16(x: __m512i) -> __m512bh {
    // e4m3's exponent and mantissa fit bf16's fields after a shift; its 8 subnormals (0 to 7 eighths of 2^-6) don't.
    const SMALL: [u16; 8] = [0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60];
    let magnitude = _mm512_slli_epi16::<4>(_mm512_and_si512(x, _mm512_set1_epi16(0x7f)));
    let normal = _mm512_add_epi16(magnitude, _mm512_set1_epi16(120 << 7));
    let table = _mm512_broadcast_i32x4(_mm_loadu_si128(SMALL.as_ptr().cast()));
    let is_small = _mm512_testn_epi16_mask(x, _mm512_set1_epi16(0x78));
    let y = _mm512_mask_permutexvar_epi16(normal, is_small, x, table);
    bh(_mm512_or_si512(y, _mm512_and_si512(x, _mm512_set1_epi16(-0x8000))))
}

/// Accumulators for R rows: 64 tokens at once, or 32 where that would need more than 16.
const fn vectors(rows: usize) -> usize {
    if rows > 4 { 2 } else { 4 }
}

/// Codes of a key unit as pairs of bf16.
trait KeyPairs: Code {
    /// Channels 2 i and 2 i + 1 of each unit.
    unsafe fn pair(x: __m512i, i: usize) -> __m512bh;
}

impl KeyPairs for Int4 {
    #[inline(always)]
    unsafe fn pair(x: __m512i, i: usize) -> __m512bh {
        bh(_mm512_permutexvar_epi16(_mm512_srl_epi32(x, _mm_cvtsi32_si128(4 * i as i32)), four_bits_bf16()))
    }
}

impl KeyPairs for Fp8 {
    #[inline(always)]
    unsafe fn pair(x: __m512i, i: usize) -> __m512bh {
        // Bytes 0 and 1, or 2 and 3, to the high ends of the unit's halves, then down with their signs.
        let x = _mm512_srl_epi32(x, _mm_cvtsi32_si128(16 * i as i32));
        let y = _mm512_or_si512(
            _mm512_and_si512(_mm512_slli_epi32::<8>(x), _mm512_set1_epi32(0x0000_ff00)),
            _mm512_and_si512(_mm512_slli_epi32::<16>(x), _mm512_set1_epi32(-0x0100_0000)),
        );
        e4m3_bf16(_mm512_srai_epi16::<8>(y))
    }
}

/// `Codewise::scores` by pairs of bf16.
#[inline(always)]
unsafe fn scores_pairs<C: KeyPairs, const R: usize>(a: &rowwise::Block, out: *mut f32) {
    let pairs = C::CODES.fold() / 2;
    let add = compact::scale_q::<Pairs, R>(a, a.codes.units);
    let units = a.codes.width / (2 * pairs);
    let per = a.codes.v_lines.div_ceil(4 / vectors(R) * units);
    for t0 in (0..4).step_by(vectors(R)) {
        let mut acc = [[V::splat(0.0); 4]; R];
        for u in 0..units {
            compact::ask_for::<V>(a.v, per, t0 / vectors(R) * units + u);
            let p = a.k.add((u * 4 + t0) * 64);
            let mut x = [_mm512_setzero_si512(); 4];
            for t in 0..vectors(R) {
                x[t] = _mm512_loadu_si512(p.add(t * 64).cast());
            }
            for i in 0..pairs {
                let mut b = [bh(_mm512_setzero_si512()); 4];
                for t in 0..vectors(R) {
                    b[t] = C::pair(x[t], i);
                }
                for r in 0..R {
                    let q = Pairs::splat(a.codes.units.add((r * units + u) * pairs + i));
                    for t in 0..vectors(R) {
                        acc[r][t] = Pairs::dot(acc[r][t], q, b[t]);
                    }
                }
            }
        }
        for r in 0..R {
            for t in 0..vectors(R) {
                acc[r][t].add(V::splat(add[r])).store(out.add((r * 4 + t0 + t) * 16));
            }
        }
    }
}

/// q times the scales of a group, in whole numbers of 15 bits and their sign: bytes `[2][R][width]`, high ones first.
/// Returns, for each row, what a product is multiplied by, and what is added then.
#[inline(always)]
unsafe fn scale_q_bytes<const R: usize>(a: &rowwise::Block, dst: *mut u8) -> ([f32; R], [f32; R]) {
    let width = a.codes.width;
    let (mut factor, mut add) = ([0.0f32; R], [0.0f32; R]);
    for r in 0..R {
        let mut x = [_mm512_setzero_ps(); 16];
        let (mut top, mut offsets) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for c in 0..width / 16 {
            let q = V::load(a.codes.q.add(r * width + c * 16)).0;
            let param = |at: usize| V::load_f16(a.codes.k_params.add(at)).0;
            offsets = _mm512_fmadd_ps(q, param(width + c * 16), offsets);
            x[c] = _mm512_mul_ps(q, param(c * 16));
            top = _mm512_max_ps(top, _mm512_abs_ps(x[c]));
        }
        // 127 * 256: the high byte stays within a signed one after rounding.
        let top = _mm512_reduce_max_ps(top);
        factor[r] = top / 32512.0;
        let inv = _mm512_set1_ps(if top > 0.0 { 32512.0 / top } else { 0.0 });
        let mut sum = _mm512_setzero_si512();
        for c in 0..width / 16 {
            let n = _mm512_cvtps_epi32(_mm512_mul_ps(x[c], inv));
            sum = _mm512_add_epi32(sum, n);
            let high = _mm512_srai_epi32::<8>(_mm512_add_epi32(n, _mm512_set1_epi32(128)));
            let low = _mm512_sub_epi32(n, _mm512_slli_epi32::<8>(high));
            let at = dst.add(r * width + c * 16);
            _mm_storeu_si128(at.cast(), _mm512_cvtepi32_epi8(high));
            _mm_storeu_si128(at.add(R * width).cast(), _mm512_cvtepi32_epi8(low));
        }
        // Codes are multiplied as code + 128.
        let shift = -128.0 * f64::from(_mm512_reduce_add_epi32(sum)) * f64::from(factor[r]);
        add[r] = (f64::from(_mm512_reduce_add_ps(offsets)) + shift) as f32;
    }
    (factor, add)
}

unsafe impl Codewise<Int4> for Pairs {
    #[inline(always)]
    unsafe fn scores<const R: usize>(a: &rowwise::Block, out: *mut f32) {
        scores_pairs::<Int4, R>(a, out);
    }
    const PART: usize = 4;
    #[inline(always)]
    unsafe fn load_v(a: *const u8, b: *const u8, _part: usize) -> [__m512bh; 4] {
        let (x, y) =
            (_mm512_cvtepu8_epi16(_mm256_loadu_si256(a.cast())), _mm512_cvtepu8_epi16(_mm256_loadu_si256(b.cast())));
        let (low, high) = (_mm512_unpacklo_epi16(x, y), _mm512_unpackhi_epi16(x, y));
        let t = four_bits_bf16();
        [
            bh(_mm512_permutexvar_epi16(low, t)),
            bh(_mm512_permutexvar_epi16(high, t)),
            bh(_mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(low), t)),
            bh(_mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(high), t)),
        ]
    }
    fn order(i: usize, lane: usize) -> usize {
        i / 2 * 32 + lane / 4 * 8 + i % 2 * 4 + lane % 4
    }
}

unsafe impl Codewise<Int8> for Pairs {
    /// By bytes (VPDPBUSD): the codes need no conversion at all, and q keeps 15 bits, twice bf16's.
    #[inline(always)]
    unsafe fn scores<const R: usize>(a: &rowwise::Block, out: *mut f32) {
        let q: *mut u8 = a.codes.units.cast();
        let (factor, add) = scale_q_bytes::<R>(a, q);
        let units = a.codes.width / 4;
        let flip = _mm512_set1_epi8(-128);
        let per = a.codes.v_lines.div_ceil(2 * units);
        for t0 in (0..4).step_by(2) {
            for r0 in (0..R).step_by(4) {
                let mut acc = [[[_mm512_setzero_si512(); 2]; 2]; 4];
                for u in 0..units {
                    compact::ask_for::<V>(a.v, per, t0 / 2 * units + u);
                    let p = a.k.add((u * 4 + t0) * 64);
                    let x = _mm512_xor_si512(_mm512_loadu_si512(p.cast()), flip);
                    let y = _mm512_xor_si512(_mm512_loadu_si512(p.add(64).cast()), flip);
                    for r in 0..if R < 4 { R } else { 4 } {
                        for digit in 0..2 {
                            let at: *const i32 = q.add((digit * R + r0 + r) * units * 4 + u * 4).cast();
                            let b = _mm512_set1_epi32(at.read_unaligned());
                            acc[r][digit][0] = _mm512_dpbusd_epi32(acc[r][digit][0], x, b);
                            acc[r][digit][1] = _mm512_dpbusd_epi32(acc[r][digit][1], y, b);
                        }
                    }
                }
                for r in 0..if R < 4 { R } else { 4 } {
                    for t in 0..2 {
                        let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(acc[r][0][t]), acc[r][1][t]);
                        let (f, b) = (_mm512_set1_ps(factor[r0 + r]), _mm512_set1_ps(add[r0 + r]));
                        let s = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), f, b);
                        _mm512_storeu_ps(out.add(((r0 + r) * 4 + t0 + t) * 16), s);
                    }
                }
            }
        }
    }
    const PART: usize = 4;
    #[inline(always)]
    unsafe fn load_v(a: *const u8, b: *const u8, _part: usize) -> [__m512bh; 4] {
        let mut found = [bh(_mm512_setzero_si512()); 4];
        for i in 0..4 {
            let (x, y) = (V::load_i8(a.add(16 * i)), V::load_i8(b.add(16 * i)));
            // The low half of a whole number's float32 is 0: shift and join, no rounding needed.
            let x = _mm512_srli_epi32::<16>(_mm512_castps_si512(x.0));
            found[i] = bh(_mm512_or_si512(x, _mm512_castps_si512(y.0)));
        }
        found
    }
    fn order(i: usize, lane: usize) -> usize {
        i * 16 + lane
    }
}

unsafe impl Codewise<Fp8> for Pairs {
    #[inline(always)]
    unsafe fn scores<const R: usize>(a: &rowwise::Block, out: *mut f32) {
        scores_pairs::<Fp8, R>(a, out);
    }
    const PART: usize = 4;
    #[inline(always)]
    unsafe fn load_v(a: *const u8, b: *const u8, _part: usize) -> [__m512bh; 4] {
        let mut found = [bh(_mm512_setzero_si512()); 4];
        for i in 0..2 {
            let x = _mm512_cvtepi8_epi16(_mm256_loadu_si256(a.add(32 * i).cast()));
            let y = _mm512_cvtepi8_epi16(_mm256_loadu_si256(b.add(32 * i).cast()));
            found[2 * i] = e4m3_bf16(_mm512_unpacklo_epi16(x, y));
            found[2 * i + 1] = e4m3_bf16(_mm512_unpackhi_epi16(x, y));
        }
        found
    }
    fn order(i: usize, lane: usize) -> usize {
        i / 2 * 32 + lane / 4 * 8 + i % 2 * 4 + lane % 4
    }
}

mod base {
    use super::*;
    instantiate_common! { #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]; vector V; }
    instantiate! {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")];
        vector V;
        panel f32: Float<V>, load Raw, 12 x 2, tiles 1, pv 6 x 4;
        panel bf16: Float<V>, load Bf16, 12 x 2, tiles 1, pv 6 x 4;
        panel f16: Float<V>, load F16, 12 x 2, tiles 1, pv 6 x 4;
        backward gradients: Float<V>, 8 x 3, sums 6 x 4 x 2, packs f32 Raw, bf16 Bf16, f16 F16;
        codes float_codes: Float<V>;
        rows f32_rows: FloatRows<V, Raw>, pv 8, 8, 4, 2;
        rows bf16_rows: FloatRows<V, Bf16>, pv 8, 8, 4, 2;
        rows f16_rows: FloatRows<V, F16>, pv 8, 8, 4, 2;
    }
}

mod dot {
    use super::*;
    instantiate! {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,f16c")];
        vector V;
        panel pairs: Pairs, load Raw, 6 x 4, tiles 1, pv 6 x 4;
        backward gradients: Pairs, 8 x 3, sums 6 x 4 x 2, packs bf16 Raw;
        codes pairs_codes: Pairs;
        rows pairs_rows: Pairs, pv 8, 8, 4, 2;
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn peak_f32(rounds: usize) -> u64 {
    let mut acc = [_mm512_setzero_ps(); 24];
    let (a, b) = (_mm512_set1_ps(std::hint::black_box(1e-3)), _mm512_set1_ps(std::hint::black_box(0.9999)));
    for _ in 0..rounds {
        for x in &mut acc {
            *x = _mm512_fmadd_ps(*x, b, a);
        }
    }
    let sum = acc.iter().fold(_mm512_setzero_ps(), |s, x| _mm512_add_ps(s, *x));
    std::hint::black_box(_mm512_reduce_add_ps(sum));
    rounds as u64 * 24 * 32
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn peak_bf16(rounds: usize) -> u64 {
    let mut acc = [_mm512_setzero_ps(); 24];
    let a = bh(_mm512_set1_epi32(std::hint::black_box(0x3f00_3f00)));
    let b = bh(_mm512_set1_epi32(std::hint::black_box(0x3f00_3f00)));
    for _ in 0..rounds {
        for x in &mut acc {
            *x = _mm512_dpbf16_ps(*x, a, b);
        }
    }
    let sum = acc.iter().fold(_mm512_setzero_ps(), |s, x| _mm512_add_ps(s, *x));
    std::hint::black_box(_mm512_reduce_add_ps(sum));
    rounds as u64 * 24 * 64
}

/// AVX-512 without BF16 dot products: everything in float32.
pub const AVX512: Kernels = table!(peak | _ | peak_f32);

/// AVX-512 with BF16 dot products for bf16 inputs.
pub const AVX512_BF16: Kernels = Kernels {
    panel: |dtype| if dtype == DType::BF16 { dot::pairs::KERNEL } else { (AVX512.panel)(dtype) },
    rows: |dtype| if dtype == DType::BF16 { dot::pairs_rows::KERNEL } else { (AVX512.rows)(dtype) },
    backward: |own, grad| match (own, grad) {
        (DType::BF16, DType::BF16) => dot::gradients::kernel(dot::gradients::bf16::PACKS, dot::gradients::bf16::PACKS),
        _ => (AVX512.backward)(own, grad),
    },
    peak: |dtype| if dtype == DType::BF16 { peak_bf16 } else { peak_f32 },
    ..AVX512
};

/// The same, but for float32 where many rows are multiplied. On Intel's cores VDPBF16PS does half the work of FMA in the same
/// time (Emerald Rapids: 32 multiply-adds in two cycles, FMA 64; AMD's Zen 5: 128 and 64), so prefill ran at 64% of this.
pub const AVX512_FMA: Kernels =
    Kernels { panel: AVX512.panel, backward: AVX512.backward, peak: AVX512.peak, ..AVX512_BF16 };
