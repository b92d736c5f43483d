//! Storing keys and values, and attention over them.

use std::ops::Range;

use bitnet_core::backend::{AttentionShape, Span};
use bitnet_core::numerics::ATTENTION_SPLIT;

use super::{Compute, at_least, lock};
use crate::arch::{Query, partial_len};
use crate::buffer::Buffer;
use crate::kv::{KvStore, Side};
use crate::threads::Chunks;

/// The query heads of one row that share a key/value head.
struct Job<'a> {
    query: Query<'a>,
    /// Tokens that the row sees.
    seen: Range<usize>,
}

impl Job<'_> {
    /// The splits that hold seen tokens.
    fn splits(&self) -> Range<usize> {
        self.seen.start / ATTENTION_SPLIT..self.seen.end.div_ceil(ATTENTION_SPLIT)
    }

    /// The seen tokens of one split.
    fn tokens(&self, split: usize) -> Range<usize> {
        let (start, end) = (split * ATTENTION_SPLIT, (split + 1) * ATTENTION_SPLIT);
        self.seen.start.max(start)..self.seen.end.min(end)
    }
}

impl Compute {
    pub(crate) fn kv_write(
        &self,
        kv: &mut KvStore,
        layer: usize,
        k: &Buffer,
        v: &Buffer,
        spans: &[Span<'_>],
    ) {
        let head_size = kv.layout().head_size;
        for (side, x) in [(Side::Key, k), (Side::Value, v)] {
            for head in 0..kv.layout().kv_heads {
                let place = kv.place(layer, side, head);
                for span in spans {
                    for (token, row) in (span.position..).zip(span.rows.clone()) {
                        let values = &x.row(row)[head * head_size..(head + 1) * head_size];
                        kv.write(self.kernels, place.row(span.blocks, token), values);
                    }
                }
            }
        }
    }

    pub(crate) fn attention(
        &self,
        shape: AttentionShape,
        layer: usize,
        q: &Buffer,
        kv: &KvStore,
        spans: &[Span<'_>],
        out: &mut Buffer,
    ) {
        let (kv_heads, head_size) = (kv.layout().kv_heads, kv.layout().head_size);
        assert!(shape.heads.is_multiple_of(kv_heads), "query heads share key/value heads evenly");
        assert_eq!(q.cols(), shape.heads * head_size, "width of the queries");
        let shared = shape.heads / kv_heads;
        let rows = spans.iter().map(|span| span.rows.end).max().unwrap_or(0);
        let out = out.shape(rows, shape.heads * head_size);
        let longest = spans.iter().map(|span| span.position + span.rows.len()).max().unwrap_or(0);

        // Jobs are numbered as the pieces of `out` that they fill: row by row, head by head.
        let job = |index: usize| {
            let (row, head) = (index / kv_heads, index % kv_heads);
            let span = spans.iter().find(|span| span.rows.contains(&row))?;
            let position = span.position + row - span.rows.start;
            let first = shape.window.map_or(0, |window| (position + 1).saturating_sub(window));
            let query = Query {
                queries: &q.row(row)[head * shared * head_size..][..shared * head_size],
                head_size,
                scale: shape.scale,
                rows: &kv.rows,
                keys: kv.place(layer, Side::Key, head),
                values: kv.place(layer, Side::Value, head),
                blocks: span.blocks,
            };
            Some(Job { query, seen: first..position + 1 })
        };
        let partial = shared * partial_len(head_size);
        let room = head_size + shared * ATTENTION_SPLIT;
        let mut scratch = self.scratch();
        let scratch = &mut *scratch;
        let threads = &scratch.threads;
        let jobs = rows * kv_heads;
        let splits = longest.div_ceil(ATTENTION_SPLIT);

        if splits > 1 && jobs < 4 * threads.len() && threads.len() > 1 {
            // Few jobs over a long context: the threads share the splits.
            let partials = at_least(&mut scratch.partials, jobs * splits * partial);
            self.pool.run(Chunks::new(partials, partial), |thread, (index, partials)| {
                let Some(job) = job(index / splits) else { return };
                let split = index % splits;
                if job.splits().contains(&split) {
                    let mut own = lock(&threads[thread]);
                    let room = at_least(&mut own.floats, room);
                    self.kernels.attend(job.query, job.tokens(split), room, partials);
                }
            });
            let pieces = out.chunks_exact_mut(shared * head_size).enumerate();
            for ((index, out), partials) in pieces.zip(partials.chunks_exact_mut(splits * partial))
            {
                let Some(job) = job(index) else { continue };
                let mut done = partials[job.splits().start * partial..].chunks_exact_mut(partial);
                let total = done.next().expect("a token sees at least itself");
                for part in done.take(job.splits().len() - 1) {
                    self.kernels.merge(head_size, total, part);
                }
                self.kernels.finish(head_size, total, out);
            }
        } else {
            self.pool.run(Chunks::new(out, shared * head_size), |thread, (index, out)| {
                let Some(job) = job(index) else { return };
                let mut own = lock(&threads[thread]);
                let (room, partials) =
                    at_least(&mut own.floats, room + 2 * partial).split_at_mut(room);
                let (total, part) = partials.split_at_mut(partial);
                let mut splits = job.splits();
                let first = splits.next().expect("a token sees at least itself");
                self.kernels.attend(job.query, job.tokens(first), room, total);
                for split in splits {
                    self.kernels.attend(job.query, job.tokens(split), room, part);
                    self.kernels.merge(head_size, total, part);
                }
                self.kernels.finish(head_size, total, out);
            });
        }
    }
}
