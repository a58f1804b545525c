//! The algebra of partials: `(out, lse)` over some keys, and the one merge that joins them.
//!
//! `merge` of partials `(o_i, s_i)`: `s = ln sum exp(s_i)`, `o = sum exp(s_i - s) o_i`. It is associative and
//! commutative up to rounding, with `(0, -inf)` as its neutral element; exponents are never positive, so nothing
//! overflows whatever the scores were (a bare `exp(a - b)` did, in EasyContext's issue 14).

/// Weights `exp(s_i - s)` of the partials whose log-sum-exps are `lses`, written to `weights`; returns `s`.
///
/// All -inf (no partial saw a key) gives weights 0 and `s = -inf`; a NaN gives NaN.
pub fn merge_weights(lses: impl Iterator<Item = f32> + Clone, weights: &mut [f32]) -> f32 {
    let mut top = f32::NEG_INFINITY;
    for s in lses.clone() {
        // f32::max would drop a NaN.
        top = if s > top || s.is_nan() { s } else { top };
        if top.is_nan() {
            break;
        }
    }
    if top == f32::NEG_INFINITY {
        weights.fill(0.0);
        return top;
    }
    let mut sum = 0.0f64;
    for (w, s) in weights.iter_mut().zip(lses) {
        // A +inf score makes inf - inf = NaN, as it does in one pass.
        let e = f64::from(s - top).exp();
        *w = e as f32;
        sum += e;
    }
    let inv = (1.0 / sum) as f32;
    for w in weights.iter_mut() {
        *w *= inv;
    }
    (f64::from(top) + sum.ln()) as f32
}

/// `ln sum exp` from a running reference `m` in base 2 and the sum `l` of `2^(score - m)`.
pub fn lse_from_base2(m: f32, l: f32) -> f32 {
    if l == 0.0 {
        return f32::NEG_INFINITY;
    }
    ((f64::from(m) + f64::from(l).log2()) * std::f64::consts::LN_2) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_sum_to_one_and_never_overflow() {
        let mut w = [0.0; 3];
        for base in [-1e30f32, -90.0, 0.0, 88.0, 1e30] {
            let lses = [base, base, base];
            let s = merge_weights(lses.iter().copied(), &mut w);
            assert!((w.iter().sum::<f32>() - 1.0).abs() < 1e-6, "{base}: {w:?}");
            assert!((f64::from(s) - (f64::from(base) + 3f64.ln())).abs() <= f64::from(base.abs()) * 1e-7 + 1e-6);
        }
    }

    #[test]
    fn empty_partials_are_neutral() {
        let mut w = [1.0; 2];
        assert_eq!(merge_weights([f32::NEG_INFINITY; 2].into_iter(), &mut w), f32::NEG_INFINITY);
        assert_eq!(w, [0.0; 2]);
        let s = merge_weights([f32::NEG_INFINITY, 3.0].into_iter(), &mut w);
        assert_eq!((s, w), (3.0, [0.0, 1.0]));
    }

    #[test]
    fn nan_is_not_hidden() {
        let mut w = [0.0; 2];
        assert!(merge_weights([f32::NAN, 1.0].into_iter(), &mut w).is_nan());
        assert!(merge_weights([1.0, f32::NAN].into_iter(), &mut w).is_nan());
    }
}
