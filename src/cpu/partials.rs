//! Where the splits of a task leave their partials until they are merged.

use super::{Context, pool};
use crate::cpu::arch::Kernels;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::softmax::merge_weights;

/// `[task][split][row]` of head_dim float32 and one lse.
pub(super) struct Partials {
    data: Vec<f32>,
    splits: usize,
    rows: usize,
    head_dim: usize,
}

/// Lets tasks write their own slots from several threads.
pub(super) struct Slots {
    ptr: *mut f32,
}
// SAFETY: each slot is written by one task (see `slot`).
unsafe impl Sync for Slots {}

impl Partials {
    pub fn new(tasks: usize, splits: usize, rows: usize, head_dim: usize) -> Result<Self> {
        let n = tasks * splits * rows * (head_dim + 1);
        let mut data = Vec::new();
        data.try_reserve_exact(n).map_err(|e| Error::Resources(format!("{} bytes for partials: {e}", n * 4)))?;
        data.resize(n, 0.0);
        Ok(Self { data, splits, rows, head_dim })
    }

    pub fn slots(&mut self) -> Slots {
        Slots { ptr: self.data.as_mut_ptr() }
    }

    /// Offset of a slot: head_dim outputs, then the lse.
    fn at(&self, task: usize, split: usize, row: usize) -> usize {
        ((task * self.splits + split) * self.rows + row) * (self.head_dim + 1)
    }

    /// Where task `task` leaves row `row` of split `split`.
    pub fn slot(&self, slots: &Slots, task: usize, split: usize, row: usize) -> *mut f32 {
        assert!(split < self.splits && row < self.rows);
        slots.ptr.wrapping_add(self.at(task, split, row))
    }

    /// Joins all splits. `target(task, row)` says where a row goes: out row, its dtype, and the lse's place if wanted;
    /// None for padding rows.
    pub fn join(
        &self,
        tasks: usize,
        kernels: &Kernels,
        cx: &Context,
        target: impl Fn(usize, usize) -> Option<(*mut u8, DType, Option<*mut u8>)> + Sync,
    ) -> Result<()> {
        pool::run(cx, tasks, 4, |task| {
            let mut weights = vec![0.0; self.splits];
            let mut acc = vec![0.0f32; self.head_dim];
            for row in 0..self.rows {
                let Some((out, dtype, lse)) = target(task, row) else { continue };
                let lses = (0..self.splits).map(|s| self.data[self.at(task, s, row) + self.head_dim]);
                let joined = merge_weights(lses, &mut weights);
                acc.fill(0.0);
                for (s, w) in weights.iter().enumerate() {
                    let x = &self.data[self.at(task, s, row)..][..self.head_dim];
                    // SAFETY: the kernels are this CPU's; both slices have head_dim elements.
                    unsafe { (kernels.accumulate)(acc.as_mut_ptr(), x.as_ptr().cast(), DType::F32, *w, self.head_dim) }
                }
                // SAFETY: as above; `target` names the row of the output that belongs to this task alone.
                unsafe {
                    (kernels.finish)(acc.as_ptr(), 1.0, self.head_dim, dtype, out);
                    if let Some(lse) = lse {
                        DType::F32.write(lse, joined);
                    }
                }
            }
        })
    }
}
