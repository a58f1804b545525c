//! Every mistake in a call is an error that names the argument, what was expected and what came.

use half::bf16;
use llama1m_ext::{AttnArgs, KvRef, TensorMut, TensorRef};

struct Call {
    q: [usize; 4],
    k: [usize; 4],
    out: [usize; 4],
    lse: [usize; 4],
    scale: Option<f64>,
    q_start: Option<i64>,
    kv_start: Option<Vec<i64>>,
}

impl Default for Call {
    fn default() -> Self {
        Self {
            q: [2, 4, 3, 16],
            k: [2, 2, 7, 16],
            out: [2, 4, 3, 16],
            lse: [2, 4, 3, 1],
            scale: None,
            q_start: None,
            kv_start: None,
        }
    }
}

impl Call {
    fn error(&self) -> String {
        let x = vec![0.0f32; 4096];
        let (mut o, mut s) = (x.clone(), x.clone());
        let view = |n: &str, shape| TensorRef::dense(n, &x, shape).unwrap();
        let args = AttnArgs {
            q: view("q", self.q),
            kv: KvRef::dense(view("k", self.k), view("v", self.k)).unwrap(),
            out: TensorMut::dense("out", &mut o, self.out).unwrap(),
            lse: Some(TensorMut::dense("lse", &mut s, self.lse).unwrap()),
            causal: true,
            softmax_scale: self.scale,
            q_start: self.q_start,
            kv_start: self.kv_start.as_deref(),
            kv_end: None,
        };
        args.validate().err().map_or("none".into(), |e| e.to_string())
    }
}

#[test]
fn mistakes_are_named() {
    let d = Call::default;
    assert_eq!(d().error(), "none");
    let expect = [
        (Call { k: [2, 3, 7, 16], ..d() }, "k: expected kv_heads to divide q_heads=4, got 3"),
        (Call { k: [1, 2, 7, 16], ..d() }, "k: expected [2, kv_heads, kv_len, 16]"),
        (Call { k: [2, 2, 7, 8], ..d() }, "k: expected [2, kv_heads, kv_len, 16]"),
        (
            Call { q: [2, 4, 3, 4], k: [2, 2, 7, 4], out: [2, 4, 3, 4], ..d() },
            "q: expected head_dim from 8 to 256, got head_dim 4",
        ),
        (Call { out: [2, 4, 2, 16], ..d() }, "out: expected the shape of q"),
        (Call { lse: [2, 4, 2, 1], ..d() }, "lse: expected [2, 4, 3], got [2, 4, 2]"),
        (Call { scale: Some(f64::NAN), ..d() }, "softmax_scale: expected a finite float32 number, got NaN"),
        (Call { scale: Some(1e300), ..d() }, "softmax_scale: expected a finite float32 number, got 1"),
        (Call { q_start: Some(i64::MAX), ..d() }, "q_start: expected |q_start| <= 2^60"),
        (Call { kv_start: Some(vec![0]), ..d() }, "kv_start: expected one entry for each of 2 batch rows, got 1"),
        (Call { kv_start: Some(vec![0, -3]), ..d() }, "kv_start: expected numbers >= 0, got -3"),
    ];
    for (call, want) in expect {
        let got = call.error();
        assert!(got.starts_with(want), "{got}\n not {want}");
    }
}

#[test]
fn views_stay_inside_their_memory() {
    let x = vec![0.0f32; 100];
    assert!(TensorRef::dense("x", &x, [1, 1, 5, 20]).is_ok());
    let long = TensorRef::dense("x", &x, [1, 1, 6, 20]).unwrap_err().to_string();
    assert!(long.contains("400 bytes"), "{long}");
    assert!(TensorRef::new("x", &x, [1, 1, 2, 20], [0, 0, 81, 1]).is_err());
    assert!(TensorRef::new("x", &x, [1, 1, 2, 20], [0, 0, 80, 1]).is_ok());
    assert!(TensorRef::new("x", &x, [1, 1, 2, 20], [0, 0, 40, 2]).unwrap_err().to_string().contains("stride 2"));
    let huge = [usize::MAX / 2, 3, 5, 7];
    assert!(TensorRef::new("x", &x, huge, [usize::MAX / 3, 5, 7, 1]).is_err());
    assert!(TensorRef::new("x", &x, [0, 3, 5, 7], [usize::MAX, usize::MAX, 7, 1]).is_ok());
    let mut y = vec![bf16::ZERO; 64];
    // SAFETY: a live slice.
    let twice = unsafe {
        TensorMut::from_raw("out", y.as_mut_ptr().cast(), 128, llama1m_ext::DType::BF16, [1, 2, 2, 16], [0, 0, 16, 1])
    };
    assert!(twice.unwrap_err().to_string().contains("stride 0"));
}

#[test]
fn pages_must_agree() {
    let x = vec![0.0f32; 4096];
    let h = vec![bf16::ZERO; 4096];
    let p = |shape| TensorRef::dense("k", &x, shape).unwrap();
    let b = |shape| TensorRef::dense("k", &h, shape).unwrap();
    let (a, c) = (p([1, 2, 8, 16]), p([1, 2, 4, 16]));
    assert!(KvRef::paged(vec![a, c], vec![a, c], 12).is_ok());
    let text = |r: llama1m_ext::Result<KvRef>| r.unwrap_err().to_string();
    assert!(text(KvRef::paged(vec![a, c], vec![a, c], 13)).contains("at most the 12 tokens"));
    assert!(text(KvRef::paged(vec![a, c], vec![a], 8)).contains("as many pages as k"));
    assert!(text(KvRef::paged::<TensorRef>(vec![], vec![], 0)).contains("at least one"));
    assert!(text(KvRef::paged(vec![a, c], vec![c, a], 8)).contains("v page 0"));
    assert!(text(KvRef::paged(vec![a, p([1, 1, 4, 16])], vec![a, c], 8)).contains("k page 1"));
    assert!(text(KvRef::dense(a, b([1, 2, 8, 16]))).contains("bfloat16"));
}
