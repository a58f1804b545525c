//! Rotation of q and k: values, dtypes, strides, in place, partial rotation, errors.

mod common;

use common::{Real, Rng};
use half::{bf16, f16};
use llama1m_ext::cpu::rope::rope_apply;
use llama1m_ext::rope::turns;
use llama1m_ext::{Context, TensorMut, TensorRef};

fn frequencies(half: usize, theta: f64) -> Vec<f64> {
    (0..half).map(|i| theta.powf(-(i as f64) / half as f64)).collect()
}

fn check<T: Real>(head_dim: usize, half: usize, in_place: bool) {
    let (batch, heads, len) = (2, 3, 37);
    let mut rng = Rng(head_dim as u64);
    let inv = frequencies(half, 2.8e9);
    let t: Vec<u64> = inv.iter().map(|x| turns(*x).unwrap()).collect();
    let x: Vec<T> = rng.normals(batch * heads * len * head_dim).into_iter().map(<T as Real>::from).collect();
    let positions: Vec<i64> = (0..batch * len).map(|_| rng.below(1 << 20) as i64).collect();
    let shape = [batch, heads, len, head_dim];
    let mut out = if in_place { x.clone() } else { vec![<T as Real>::from(f32::NAN); x.len()] };
    let source = out.as_ptr();
    let dst = TensorMut::dense("out", &mut out, shape).unwrap();
    let src = if in_place {
        // SAFETY: the same memory, as ops.rope_apply(q, q_out=q) makes it; rows are read before they are written.
        unsafe {
            TensorRef::from_raw(
                "q",
                source.cast(),
                size_of_val(&x[..]),
                T::DTYPE,
                shape,
                llama1m_ext::tensor::contiguous(shape),
            )
        }
        .unwrap()
    } else {
        TensorRef::dense("q", &x, shape).unwrap()
    };
    rope_apply(&[("q", src, dst)], &positions, &t, 1.5, &Context::new(2)).unwrap();
    for (n, (got, row)) in out.chunks(head_dim).zip(x.chunks(head_dim)).enumerate() {
        let (b, i) = (n / (heads * len), n % len);
        let pos = positions[b * len + i] as f64;
        for d in 0..head_dim {
            let want = if d >= 2 * half {
                row[d].to()
            } else {
                let (s, c) = (pos * inv[d % half]).sin_cos();
                let (x1, x2) = (row[d % half].to(), row[d % half + half].to());
                1.5 * if d < half { x1 * c - x2 * s } else { x2 * c + x1 * s }
            };
            let e = (got[d].to() - want).abs();
            // One rounding to T, on top of float32 arithmetic.
            let half_ulp = match T::DTYPE {
                llama1m_ext::DType::F32 => 2f64.powi(-22),
                llama1m_ext::DType::BF16 => 2f64.powi(-8),
                llama1m_ext::DType::F16 => 2f64.powi(-11),
            };
            assert!(e <= half_ulp * want.abs() + 4e-6, "{n} {d}: {} {want}", got[d].to());
        }
    }
}

#[test]
fn rotates_and_rounds_once() {
    for (head_dim, half) in [(8, 4), (64, 32), (128, 64), (256, 128), (80, 40), (33, 16), (96, 20), (10, 1)] {
        for in_place in [false, true] {
            check::<f32>(head_dim, half, in_place);
            check::<bf16>(head_dim, half, in_place);
            check::<f16>(head_dim, half, in_place);
        }
    }
}

#[test]
fn mistakes_are_named() {
    let x = vec![0.0f32; 2 * 5 * 16];
    let mut y = x.clone();
    let t = vec![turns(1.0).unwrap(); 8];
    let mut go = |positions: &[i64], t: &[u64], scaling: f64| {
        let src = TensorRef::dense("q", &x, [1, 2, 5, 16]).unwrap();
        let dst = TensorMut::dense("q", &mut y, [1, 2, 5, 16]).unwrap();
        rope_apply(&[("q", src, dst)], positions, t, scaling, &Context::new(1)).map_err(|e| e.to_string())
    };
    assert!(go(&[0; 5], &t, 1.0).is_ok());
    assert!(go(&[0; 4], &t, 1.0).unwrap_err().contains("positions"));
    assert!(go(&[0, 1, 2, -1, 3], &t, 1.0).unwrap_err().contains("-1"));
    assert!(go(&[0; 5], &[t[0]; 9], 1.0).unwrap_err().contains("18"));
    assert!(go(&[0; 5], &[], 1.0).unwrap_err().contains("inv_freq"));
    assert!(go(&[0; 5], &t, f64::NAN).unwrap_err().contains("attention_scaling"));
}
