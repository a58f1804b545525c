//! Compact keys and values: codes of 8 or 4 bits, and what they stand for.
//!
//! An element is `scale * code + offset`, scale and offset float16. Keys share them per channel over [`GROUP`] tokens of
//! a page: a few channels of a key are far larger than the rest and hardly move, so that a scale per token would spend
//! its steps on them (KIVI, 2402.02750; KVQuant, 2401.18079). Values share them per token over [`GROUP`] channels.

use half::f16;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::{BytesMut, BytesRef, TensorMut, TensorRef};

/// Tokens that share a scale of k; channels that share a scale of v.
pub const GROUP: usize = 64;

/// Channels of a row of codes: head_dim rounded up to whole groups.
pub fn width(head_dim: usize) -> usize {
    head_dim.next_multiple_of(GROUP)
}

/// What a code is. Codes lie in units of 32 bits, of one token each: 4 channels in 8 bits, 8 in 4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codes {
    /// Signed bytes.
    Int8,
    /// -8 to 7, plus 8. In a unit the even channels come before the odd ones: 0 2 4 6 1 3 5 7 from the lowest bit on.
    Int4,
    /// e4m3 without infinities (1 sign, 4 exponent, 3 mantissa bits).
    Fp8,
}

impl Codes {
    /// Channels of a unit.
    pub const fn fold(self) -> usize {
        match self {
            Self::Int4 => 8,
            Self::Int8 | Self::Fp8 => 4,
        }
    }

    /// Bytes of `width` codes.
    pub const fn bytes(self, width: usize) -> usize {
        width * 4 / self.fold()
    }

    /// The lowest code, and how far the highest is from it.
    pub const fn range(self) -> (f32, f32) {
        match self {
            Self::Int8 => (-128.0, 255.0),
            Self::Int4 => (-8.0, 15.0),
            Self::Fp8 => (-448.0, 896.0),
        }
    }

    /// Its name among the formats.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Fp8 => "fp8",
        }
    }

    /// The code of channel `c` of a key that is token `t` of its group: units `[width / fold][64 tokens]`.
    pub fn key(self, group: &[u8], t: usize, c: usize) -> f32 {
        let unit = &group[(c / self.fold() * GROUP + t) * 4..][..4];
        let i = c % self.fold();
        match self {
            Self::Int8 => f32::from(unit[i] as i8),
            Self::Fp8 => e4m3_to_f32(unit[i]),
            Self::Int4 => {
                let word = u32::from_le_bytes([unit[0], unit[1], unit[2], unit[3]]);
                (word >> int4_shift(i) & 15) as f32 - 8.0
            }
        }
    }

    /// The code of channel `c` of a value's row: bytes in order; int4: in each 64 channels byte i has channel i in its low
    /// half and 32 + i in its high half.
    pub fn value(self, row: &[u8], c: usize) -> f32 {
        match self {
            Self::Int8 => f32::from(row[c] as i8),
            Self::Int4 => {
                let byte = row[c / GROUP * (GROUP / 2) + c % (GROUP / 2)];
                let half = if c % GROUP < GROUP / 2 { byte & 15 } else { byte >> 4 };
                f32::from(half) - 8.0
            }
            Self::Fp8 => e4m3_to_f32(row[c]),
        }
    }
}

/// Where channel `i` of a unit of 8 begins: a shift by 4 * (i / 2) brings an even channel and its odd neighbour to the
/// low ends of the unit's two halves, which is what pairs of bf16 are looked up by.
#[inline(always)]
pub const fn int4_shift(i: usize) -> u32 {
    (4 * (i / 2) + 16 * (i % 2)) as u32
}

/// Scale and offset, as float32 that are float16, for numbers from `least` to `most`.
///
/// Where they don't fit into float16, or are no numbers, the offset is NaN: a result is then loudly wrong.
#[inline(always)]
pub fn scale_offset(codes: Codes, least: f32, most: f32) -> (f32, f32) {
    let (low, steps) = codes.range();
    let scale = f16::from_f32((most - least) / steps).to_f32();
    let offset = f16::from_f32(least - low * scale).to_f32();
    if scale.is_finite() && offset.is_finite() { (scale, offset) } else { (0.0, f32::NAN) }
}

/// e4m3 to float32; exact, subnormals included. 0x7f and 0xff (NaN), which nobody here writes, read as 480.
#[inline(always)]
pub fn e4m3_to_f32(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f) << 20;
    // Subnormals by way of 2^-6 (1 + m / 8): not as float32 subnormals, which torch.set_flush_denormal would lose.
    let x = if code & 0x78 == 0 {
        f32::from_bits(magnitude + (121 << 23)) - 0.015_625
    } else {
        f32::from_bits(magnitude + (120 << 23))
    };
    f32::from_bits(x.to_bits() | u32::from(code & 0x80) << 24)
}

/// float32 to e4m3, to nearest even, saturating at 448.
#[inline(always)]
pub fn f32_to_e4m3(x: f32) -> u8 {
    let bits = x.abs().min(448.0).to_bits();
    let normal = ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20).wrapping_sub(120 << 3);
    // Below 2^-6 the step is 2^-9: adding 2^14 leaves just those bits of the mantissa.
    let small = (f32::from_bits(bits) + 16384.0).to_bits() & 0xf;
    let code = if bits < 0x3c80_0000 { small } else { normal };
    (code as u8) | ((x.to_bits() >> 24) as u8 & 0x80)
}

/// Whether scales belong to channels (k) or to tokens (v), and how codes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// Keys: each channel over [`GROUP`] tokens. Codes `[batch, kv_heads, groups, bytes of 64 tokens]`, channel by channel
    /// within a group, so that a dot product needs no sum across lanes; params `[batch, kv_heads, groups, 2 * width]`.
    Channel,
    /// Values: each token over [`GROUP`] channels. Codes `[batch, kv_heads, tokens, bytes of a token]`; params
    /// `[batch, kv_heads, 2 * width / GROUP, tokens]`.
    Token,
}

/// `[batch, kv_heads, tokens, width]`; tokens in whole groups for keys.
fn check(
    name: &str,
    codes: Codes,
    axis: Axis,
    rows: [usize; 4],
    params: [usize; 4],
    dtype: DType,
) -> Result<[usize; 4]> {
    let [batch, heads, len, bytes] = rows;
    let each = if axis == Axis::Channel { GROUP } else { 1 };
    let width = bytes / each * codes.fold() / 4;
    if width == 0 || codes.bytes(width) * each != bytes || !width.is_multiple_of(GROUP) || width > GROUP * 4 {
        let want = format!("rows of 64, 128, 192 or 256 {} codes of {each} tokens", codes.name());
        return Err(Error::value(name, want, format!("shape {rows:?}")));
    }
    if dtype != DType::F16 {
        return Err(Error::type_(format!("{name} params"), "float16", dtype.name()));
    }
    let want = match axis {
        Axis::Channel => [batch, heads, len, 2 * width],
        Axis::Token => [batch, heads, 2 * width / GROUP, len],
    };
    if params != want {
        let want = format!("{want:?} to go with codes {rows:?}");
        return Err(Error::value(format!("{name} params"), want, format!("{params:?}")));
    }
    Ok([batch, heads, len * each, width])
}

/// Compact keys or values of a page, to read.
#[derive(Debug, Clone, Copy)]
pub struct CompactRef<'a> {
    /// What a code is.
    pub codes: Codes,
    /// Where scales belong.
    pub axis: Axis,
    /// See [`Axis`].
    pub rows: BytesRef<'a>,
    /// See [`Axis`].
    pub params: TensorRef<'a>,
    shape: [usize; 4],
}

impl<'a> CompactRef<'a> {
    /// Codes and their params.
    ///
    /// # Errors
    /// When the shapes don't belong together, or params are not float16.
    pub fn new(name: &str, codes: Codes, axis: Axis, rows: BytesRef<'a>, params: TensorRef<'a>) -> Result<Self> {
        let shape = check(name, codes, axis, rows.shape(), params.shape(), params.dtype())?;
        Ok(Self { codes, axis, rows, params, shape })
    }

    /// `[batch, kv_heads, tokens, width]`; of keys, tokens are whole groups.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// What one element stands for; bounds checked. For the reference.
    pub fn get(&self, b: usize, h: usize, i: usize, c: usize) -> f64 {
        let [_, _, tokens, width] = self.shape;
        assert!(i < tokens && c < width, "token {i}, channel {c} outside {:?}", self.shape);
        let (code, scale, offset) = match self.axis {
            Axis::Channel => {
                let param = |c: usize| self.params.get(b, h, i / GROUP, c);
                (self.codes.key(self.rows.bytes(b, h, i / GROUP), i % GROUP, c), param(c), param(width + c))
            }
            Axis::Token => {
                let param = |g: usize| self.params.get(b, h, g, i);
                let code = self.codes.value(self.rows.bytes(b, h, i), c);
                (code, param(c / GROUP), param(width / GROUP + c / GROUP))
            }
        };
        f64::from(scale) * f64::from(code) + f64::from(offset)
    }
}

/// Compact keys or values of a page, to write.
#[derive(Debug, Clone, Copy)]
pub struct CompactMut<'a> {
    /// What a code is.
    pub codes: Codes,
    /// Where scales belong.
    pub axis: Axis,
    /// See [`Axis`].
    pub rows: BytesMut<'a>,
    /// See [`Axis`].
    pub params: TensorMut<'a>,
    shape: [usize; 4],
}

impl<'a> CompactMut<'a> {
    /// Codes and their params.
    ///
    /// # Errors
    /// As [`CompactRef::new`].
    pub fn new(name: &str, codes: Codes, axis: Axis, rows: BytesMut<'a>, params: TensorMut<'a>) -> Result<Self> {
        let shape = check(name, codes, axis, rows.shape(), params.shape(), params.dtype())?;
        Ok(Self { codes, axis, rows, params, shape })
    }

    /// `[batch, kv_heads, tokens, width]`; of keys, tokens are whole groups.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Where token `i`'s codes and params are: of keys those of its group.
    pub fn place(&self, b: usize, h: usize, i: usize) -> (*mut u8, *mut u16) {
        match self.axis {
            Axis::Channel => (self.rows.row(b, h, i / GROUP), self.params.row(b, h, i / GROUP).cast()),
            Axis::Token => (self.rows.row(b, h, i), self.params.row(b, h, 0).cast::<u16>().wrapping_add(i)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_round_trips_and_rounds_to_nearest_even() {
        let values: Vec<f32> = (0..=0x7eu8).map(e4m3_to_f32).collect();
        assert_eq!((values[0], values[1], values[8], values[0x7e]), (0.0, 2f32.powi(-9), 2f32.powi(-6), 448.0));
        for (code, pair) in values.windows(2).enumerate() {
            let code = code as u8;
            assert!(pair[0] < pair[1]);
            for sign in [0u8, 0x80] {
                let s = if sign == 0 { 1.0 } else { -1.0 };
                assert_eq!(f32_to_e4m3(s * pair[0]), code | sign);
                let middle = (pair[0] + pair[1]) / 2.0;
                assert_eq!(f32_to_e4m3(s * middle), (code + (code & 1)) | sign, "{middle}");
                assert_eq!(f32_to_e4m3(s * (middle * 1.001)), (code + 1) | sign);
                assert_eq!(f32_to_e4m3(s * (middle * 0.999)), code | sign);
            }
        }
        assert_eq!((f32_to_e4m3(1e9), f32_to_e4m3(f32::NEG_INFINITY), f32_to_e4m3(-0.0)), (0x7e, 0xfe, 0x80));
    }

    #[test]
    fn what_float16_cannot_hold_is_no_number() {
        let codes = Codes::Int8;
        assert!(scale_offset(codes, -1.0, f32::INFINITY).1.is_nan());
        assert!(scale_offset(codes, 1e5, 1e5 + 1.0).1.is_nan());
        assert!(scale_offset(codes, f32::NAN, f32::NAN).1.is_nan());
        assert_eq!(scale_offset(codes, 3.0, 3.0), (0.0, 3.0));
    }
}
