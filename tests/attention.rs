//! Prefill and decode against the float64 reference: every boundary, dtype, head_dim, group, mask and page layout.
//! The whole file runs once per instruction-set level in CI (`LLAMA1M_ISA`).

mod common;

use common::{Case, Real, Rng, Verb};
use half::{bf16, f16};
use llama1m_ext::attention::{attention, attention_decode, attention_forward};

fn all_dtypes(c: &Case, verb: Verb, seed: u64) {
    c.check::<f32>(verb, seed);
    c.check::<bf16>(verb, seed + 1);
    c.check::<f16>(verb, seed + 2);
}

#[test]
fn lengths_around_every_block_boundary() {
    for (n, q_len) in [1, 2, 5, 6, 7, 11, 12, 13, 31, 32, 33, 63, 64, 65, 127, 128, 129].into_iter().enumerate() {
        for kv_len in [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130] {
            let c = Case { q_len, kv_len, causal: n % 2 == 0, ..Case::default() };
            all_dtypes(&c, attention_forward, (n * 100 + kv_len) as u64);
        }
    }
}

#[test]
fn every_head_dim_from_8_to_256() {
    for head_dim in 8..=256 {
        let c = Case { head_dim, q_len: 9, kv_len: 70, q_heads: 2, kv_heads: 1, ..Case::default() };
        all_dtypes(&c, attention_forward, head_dim as u64);
        all_dtypes(&Case { q_len: 2, ..c }, attention_decode, head_dim as u64);
    }
}

#[test]
fn every_group() {
    for group in [1, 2, 3, 4, 5, 7, 8, 12, 16, 71] {
        for kv_heads in [1, 3] {
            let c = Case { q_heads: group * kv_heads, kv_heads, q_len: 21, kv_len: 100, batch: 2, ..Case::default() };
            all_dtypes(&c, attention_forward, group as u64);
            all_dtypes(&Case { q_len: 3, ..c }, attention_decode, group as u64);
        }
    }
}

#[test]
fn decode_reads_each_key_once_and_merges_its_splits() {
    for kv_len in [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 4097] {
        for (q_heads, kv_heads, q_len) in [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (8, 2, 2), (3, 1, 1), (4, 4, 5)]
        {
            for threads in [1, 3] {
                let c = Case { q_heads, kv_heads, q_len, kv_len, head_dim: 128, threads, ..Case::default() };
                all_dtypes(&c, attention_decode, (kv_len * 10 + q_heads) as u64);
            }
        }
    }
}

#[test]
fn few_long_queries_are_split_over_the_keys() {
    for threads in [2, 4, 7] {
        let c = Case { q_len: 24, kv_len: 6000, q_heads: 1, head_dim: 128, threads, ..Case::default() };
        all_dtypes(&c, attention_forward, threads as u64);
    }
}

#[test]
fn intervals_hide_keys_and_leave_empty_rows() {
    let base = Case { batch: 4, q_len: 70, kv_len: 70, ..Case::default() };
    let cases = [
        (Some(vec![0, 1, 64, 70]), None),
        (None, Some(vec![70, 69, 1, 0])),
        (Some(vec![3, 33, 65, 40]), Some(vec![70, 34, 66, 12])),
        (Some(vec![1000, 0, 0, 69]), Some(vec![1000, 1000, 5, 70])),
    ];
    for (n, (kv_start, kv_end)) in cases.into_iter().enumerate() {
        for causal in [true, false] {
            let c = Case { kv_start: kv_start.clone(), kv_end: kv_end.clone(), causal, ..base.clone() };
            all_dtypes(&c, attention_forward, n as u64);
            all_dtypes(&Case { q_len: 2, ..c }, attention_decode, n as u64);
        }
    }
}

#[test]
fn queries_may_stand_anywhere() {
    for q_start in [-100, -5, -1, 0, 1, 31, 32, 90, 99, 100, 5000, i64::from(i32::MAX) * 4] {
        let c = Case { q_len: 40, kv_len: 100, q_start: Some(q_start), ..Case::default() };
        all_dtypes(&c, attention_forward, q_start.unsigned_abs());
        all_dtypes(&Case { q_len: 1, ..c }, attention_decode, q_start.unsigned_abs());
    }
}

#[test]
fn pages_of_any_size_read_as_one() {
    for pages in [vec![64, 64, 64], vec![1; 130], vec![7, 100, 3, 50], vec![0, 130, 0], vec![65, 65, 1000], vec![200]] {
        let c = Case { pages, kv_len: 130, q_len: 50, batch: 2, kv_heads: 2, ..Case::default() };
        all_dtypes(&c, attention_forward, 5);
        all_dtypes(&Case { q_len: 1, ..c }, attention_decode, 5);
    }
}

#[test]
fn any_finite_scale() {
    for scale in [0.0, 1.0, -0.3, 3.0, 1e-30, 1e-280] {
        let c =
            Case { scale: Some(scale), slack: (8.0 * scale).abs().max(1.0), q_len: 33, kv_len: 65, ..Case::default() };
        c.check::<f32>(attention_forward, 1);
        Case { slack: c.slack * 2.0, ..c.clone() }.check::<bf16>(attention_forward, 1);
        Case { q_len: 1, ..c }.check::<f32>(attention_decode, 1);
    }
}

#[test]
fn a_sharp_row_late_in_the_keys_rescales() {
    // Scores grow along the keys, so that every block moves the running reference.
    let c = Case { scale: Some(8.0), slack: 64.0, q_len: 20, kv_len: 900, causal: false, ..Case::default() };
    c.check::<f32>(attention_forward, 3);
    Case { q_len: 1, ..c }.check::<f32>(attention_decode, 3);
}

#[test]
fn random_problems() {
    let mut rng = Rng(2026);
    for seed in 0..60 {
        let kv_heads = rng.pick(&[1, 2, 3]);
        let kv_len = 1 + rng.below(300);
        let batch = 1 + rng.below(3);
        let mut bounds = |n: usize| -> Option<Vec<i64>> {
            (rng.below(3) == 0).then(|| (0..batch).map(|_| rng.below(n + 20) as i64).collect())
        };
        let (kv_start, kv_end) = (bounds(kv_len / 2), bounds(kv_len));
        let c = Case {
            batch,
            kv_heads,
            q_heads: kv_heads * rng.pick(&[1, 2, 4, 5, 8]),
            q_len: 1 + rng.below(150),
            kv_len,
            head_dim: rng.pick(&[8, 20, 33, 64, 80, 96, 128, 192, 256]),
            causal: rng.below(4) > 0,
            q_start: (rng.below(3) == 0).then(|| rng.below(400) as i64 - 50),
            kv_start,
            kv_end,
            scale: None,
            pages: if rng.below(2) == 0 { vec![] } else { vec![1 + rng.below(100); 301] },
            threads: 1 + rng.below(4),
            slack: 1.0,
        };
        all_dtypes(&c, attention, seed);
    }
}

#[test]
fn nothing_to_do_is_fine() {
    for c in [
        Case { kv_len: 0, ..Case::default() },
        Case { q_len: 0, ..Case::default() },
        Case { batch: 0, ..Case::default() },
        Case { q_heads: 0, kv_heads: 0, ..Case::default() },
    ] {
        c.check::<f32>(attention_forward, 0);
        c.check::<f32>(attention_decode, 0);
    }
}

#[test]
fn nan_in_one_query_stays_in_its_row() {
    use llama1m_ext::{AttnArgs, Context, KvRef, TensorMut, TensorRef};
    let mut rng = Rng(9);
    for verb in [attention_forward as Verb, attention_decode as Verb] {
        let mut q = rng.normals(8 * 64);
        let (k, v) = (rng.normals(200 * 64), rng.normals(200 * 64));
        q[3 * 64] = f32::NAN;
        let mut out = vec![0.0f32; q.len()];
        let args = AttnArgs {
            q: TensorRef::dense("q", &q, [1, 1, 8, 64]).unwrap(),
            kv: KvRef::dense(
                TensorRef::dense("k", &k, [1, 1, 200, 64]).unwrap(),
                TensorRef::dense("v", &v, [1, 1, 200, 64]).unwrap(),
            )
            .unwrap(),
            out: TensorMut::dense("out", &mut out, [1, 1, 8, 64]).unwrap(),
            lse: None,
            causal: false,
            softmax_scale: Some(5.0),
            q_start: None,
            kv_start: None,
            kv_end: None,
        };
        verb(args, &Context::new(1)).unwrap();
        for (i, row) in out.chunks(64).enumerate() {
            assert!(row.iter().all(|x| x.is_nan() == (i == 3)), "row {i}");
        }
    }
}

#[test]
fn an_interrupt_stops_the_work() {
    use llama1m_ext::{AttnArgs, Context, Error, KvRef, TensorMut, TensorRef};
    let n = 6000;
    let x = vec![0.5f32; n * 64];
    let mut out = vec![0.0f32; n * 64];
    let args = AttnArgs {
        q: TensorRef::dense("q", &x, [1, 1, n, 64]).unwrap(),
        kv: KvRef::dense(
            TensorRef::dense("k", &x, [1, 1, n, 64]).unwrap(),
            TensorRef::dense("v", &x, [1, 1, n, 64]).unwrap(),
        )
        .unwrap(),
        out: TensorMut::dense("out", &mut out, [1, 1, n, 64]).unwrap(),
        lse: None,
        causal: false,
        softmax_scale: None,
        q_start: None,
        kv_start: None,
        kv_end: None,
    };
    // The poll is asked at most ten times a second; this problem takes longer than that on any machine we know.
    let asked = std::cell::Cell::new(0);
    let cx = Context { threads: 1, poll: &|| asked.replace(asked.get() + 1) >= 0 };
    let r = attention_forward(args, &cx);
    assert!(r == Err(Error::Interrupted) || asked.get() == 0, "{r:?} after {} polls", asked.get());
}

#[test]
fn one_layer_of_a_million_tokens_is_addressed_in_64_bits() {
    // Decode over strides like those of 2^20 tokens x 32 heads x 128: offsets pass 2^32 elements. The memory is one
    // sparse mapping of which a few pages are touched.
    use llama1m_ext::{AttnArgs, Context, KvRef, TensorMut, TensorRef};
    let (heads, len, dim) = (33usize, 1usize << 20, 128usize);
    let bytes = heads * len * dim * 2;
    let layout = std::alloc::Layout::from_size_align(bytes, 64).unwrap();
    // SAFETY: the size is not zero; calloc maps it lazily.
    let ptr = unsafe { std::alloc::alloc_zeroed(layout) };
    if ptr.is_null() {
        eprintln!("no address space for {bytes} bytes");
        return;
    }
    let shape = [1, heads, len, dim];
    let stride = [heads * len * dim, len * dim, dim, 1];
    let mut rng = Rng(4);
    // The last head's first 40 tokens carry numbers.
    let last = (heads - 1) * len * dim;
    for i in 0..40 * dim {
        // SAFETY: inside the allocation.
        unsafe { ptr.cast::<bf16>().add(last + i).write(<bf16 as Real>::from(rng.normal())) };
    }
    // SAFETY: valid for reads until freed below.
    let k = unsafe { TensorRef::from_raw("k", ptr, bytes, llama1m_ext::DType::BF16, shape, stride) }.unwrap();
    let q: Vec<bf16> = rng.normals(heads * dim).into_iter().map(<bf16 as Real>::from).collect();
    let ends = [40i64];
    let mut out = vec![bf16::NAN; heads * dim];
    let mut spare = out.clone();
    fn args<'a>(q: &'a [bf16], k: TensorRef<'a>, ends: &'a [i64], out: &'a mut [bf16]) -> AttnArgs<'a> {
        let shape = [1, k.shape()[1], 1, k.shape()[3]];
        AttnArgs {
            q: TensorRef::dense("q", q, shape).unwrap(),
            kv: KvRef::dense(k, k).unwrap(),
            out: TensorMut::dense("out", out, shape).unwrap(),
            lse: None,
            causal: true,
            softmax_scale: None,
            q_start: None,
            kv_start: None,
            kv_end: Some(ends),
        }
    }
    attention(args(&q, k, &ends, &mut out), &Context::new(2)).unwrap();
    let p = args(&q, k, &ends, &mut spare).validate().unwrap();
    let (want, _) = llama1m_ext::reference::attention_row(&p, 0, heads - 1, 0);
    for (g, w) in out[(heads - 1) * dim..].iter().zip(&want) {
        assert!((g.to() - w).abs() < 2e-2, "{g} {w}");
    }
    assert!(want.iter().any(|w| w.abs() > 0.1), "the last head was not read");
    // SAFETY: allocated above with this layout; no view is used after this.
    unsafe { std::alloc::dealloc(ptr, layout) };
}
