//! [`CpuBackend`]: the memory and the operations of [`Backend`] on the CPU.

use std::sync::Arc;

use bitnet_core::backend::{
    Activation, ActivationPrecision, AttentionShape, Backend, GatedFfn, KvLayout, Norm, Scratch,
    Span, gated_ffn_by_parts,
};
use bitnet_core::machine::physical_cores;
use bitnet_core::{
    Candidate, DType, Error, LinearUse, OperationProfile, Pick, Screen, ShortcutCounts, Shortcuts,
    Tensor, TernaryMatrix, TiledMatrix, budget,
};
use bitnet_quant::packing::tile;

use crate::buffer::Buffer;
use crate::dispatch::{Isa, unavailable};
use crate::kv::KvStore;
use crate::linear::Linear;
use crate::ops::{Compute, Ffn};
use crate::profile::Profile;
use crate::threads::ThreadPool;

/// More threads than any machine this runs on has cores; a larger number is a mistake.
const MOST_THREADS: usize = 1024;

/// How a [`CpuBackend`] computes. No option changes a result.
#[derive(Debug, Default, Clone, Copy)]
pub struct CpuOptions {
    /// Threads, the calling one included; `None`: one per physical core that this process may use.
    pub threads: Option<usize>,
    /// Instruction set; `None`: the best that this CPU has.
    pub isa: Option<Isa>,
    /// Keeps each thread, the one that makes the backend among them, on a processor of its own.
    pub pinned: bool,
    /// Exact shortcuts that may be taken.
    pub shortcuts: Shortcuts,
    /// Keeps second copies of weights that make shortcuts possible, for models that bring none along.
    /// Costs memory.
    pub copies: bool,
    /// Keeps books on what each operation costs: see [`Backend::profile`].
    pub profile: bool,
}

/// Computes on the CPU.
pub struct CpuBackend {
    compute: Compute,
    copies: bool,
    pinned: bool,
}

impl CpuBackend {
    /// A backend with its threads started.
    ///
    /// # Errors
    /// If this CPU does not have the instruction set asked for, or the threads cannot be had.
    pub fn new(options: CpuOptions) -> Result<Self, Error> {
        let kernels = Isa::kernels(options.isa)?;
        // Two threads on one core only get in each other's way.
        let threads = options.threads.unwrap_or_else(physical_cores);
        if !(1..=MOST_THREADS).contains(&threads) {
            return Err(unavailable(format!(
                "{threads} threads were asked for: choose 1 to {MOST_THREADS}"
            )));
        }
        let pool = pool(threads, options.pinned)?;
        Ok(CpuBackend {
            compute: Compute::new(
                kernels,
                pool,
                options.shortcuts,
                Arc::default(),
                Arc::new(Profile::new(options.profile)),
            ),
            copies: options.copies,
            pinned: options.pinned,
        })
    }

    /// Threads that share each operation, the calling one included.
    pub fn threads(&self) -> usize {
        self.compute.pool.threads()
    }
}

fn pool(threads: usize, pinned: bool) -> Result<ThreadPool, Error> {
    ThreadPool::new(threads, pinned)
        .map_err(|error| unavailable(format!("cannot start {threads} threads: {error}")))
}

/// The product of `extents`, if that many elements of `bytes` each can be had.
pub(crate) fn require(what: &str, extents: &[usize], bytes: usize) -> Result<usize, Error> {
    let elements = extents.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent));
    let fitting =
        elements.filter(|&n| n.checked_mul(bytes).is_some_and(|n| n <= isize::MAX as usize));
    let Some(elements) = fitting else {
        let available = budget::available_memory().unwrap_or(0);
        return Err(Error::Memory { what: what.to_owned(), needed: u64::MAX, available });
    };
    budget::require(what, (elements * bytes) as u64)?;
    Ok(elements)
}

fn parts(norm: &Norm<CpuBackend>) -> (&[f32], f32) {
    (&norm.weight, norm.eps)
}

impl Backend for CpuBackend {
    type Buffer = Buffer;
    type Vector = Vec<f32>;
    type Linear = Linear;
    type Table = Tensor;
    type Screen = Screen;
    type Kv = KvStore;

    fn name(&self) -> String {
        let threads = self.threads();
        let plural = if threads == 1 { "" } else { "s" };
        format!("cpu ({}, {threads} thread{plural})", self.compute.kernels.name)
    }

    /// With as many threads of its own.
    fn replica(&self) -> Result<Self, Error> {
        if self.pinned {
            return Err(unavailable(
                "threads that are pinned to processors cannot be there twice".to_owned(),
            ));
        }
        let Compute { kernels, shortcuts, counts, profile, .. } = &self.compute;
        let pool = pool(self.threads(), false)?;
        let (counts, profile) = (Arc::clone(counts), Arc::clone(profile));
        Ok(CpuBackend {
            compute: Compute::new(kernels, pool, *shortcuts, counts, profile),
            ..*self
        })
    }

    fn shortcut_counts(&self) -> ShortcutCounts {
        self.compute.counts.read()
    }

    fn profile(&self) -> Vec<OperationProfile> {
        self.compute.profile.read()
    }

    fn load_vector(&self, values: &[f32]) -> Result<Vec<f32>, Error> {
        Ok(values.to_vec())
    }

    fn load_linear(
        &self,
        matrix: &TernaryMatrix,
        precision: ActivationPrecision,
        usage: LinearUse,
    ) -> Result<Linear, Error> {
        let reader =
            tile::Reader { copies: self.copies, compact: self.compute.kernels.take_compact() };
        let tiled = tile::tiled(matrix, precision, usage, reader)?;
        Linear::new(&tiled, precision, self.compute.kernels)
    }

    fn load_tiled(
        &self,
        matrix: &TiledMatrix,
        precision: ActivationPrecision,
    ) -> Result<Linear, Error> {
        Linear::new(matrix, precision, self.compute.kernels)
    }

    fn load_table(&self, table: &Tensor) -> Result<Tensor, Error> {
        let (dtype, shape) = (table.dtype(), table.shape());
        let refused = |reason: &str| Error::TensorShape {
            dtype,
            shape: shape.to_vec(),
            reason: reason.to_owned(),
        };
        match dtype {
            _ if shape.len() != 2 || table.is_empty() => {
                Err(refused("an embedding or head is [vocabulary, hidden]"))
            }
            DType::F32 | DType::F16 | DType::BF16 | DType::Q8_0 | DType::Q4K | DType::Q6K => {
                Ok(table.clone())
            }
            _ => Err(refused(
                "an embedding or head is F32, F16, BF16, Q8_0, Q4_K or Q6_K; convert it",
            )),
        }
    }

    fn load_screen(&self, screen: &Screen) -> Result<Option<Screen>, Error> {
        Ok(self.compute.shortcuts.head.then(|| screen.clone()))
    }

    fn wants_screen(&self) -> bool {
        self.compute.shortcuts.head && self.copies
    }

    fn buffer(&self, rows: usize, cols: usize) -> Result<Buffer, Error> {
        let elements = require("an activation buffer", &[rows, cols], size_of::<f32>())?;
        Ok(Buffer::new(elements, cols))
    }

    fn write(&self, buffer: &mut Buffer, cols: usize, values: &[f32]) {
        assert!(values.len().is_multiple_of(cols), "{} values in rows of {cols}", values.len());
        buffer.shape(values.len() / cols, cols).copy_from_slice(values);
    }

    fn read(&self, buffer: &Buffer, rows: usize, out: &mut Vec<f32>) -> Result<(), Error> {
        out.clear();
        out.extend_from_slice(buffer.rows(rows));
        Ok(())
    }

    fn embed(&self, table: &Tensor, tokens: &[u32], scale: f32, out: &mut Buffer) {
        self.compute.embed(table, tokens, scale, out);
    }

    fn rms_norm(&self, x: &Buffer, rows: usize, norm: &Norm<Self>, out: &mut Buffer) {
        self.compute.rms_norm(x, rows, &norm.weight, norm.eps, out);
    }

    fn head_norm(&self, x: &mut Buffer, rows: usize, norm: &Norm<Self>, head_size: usize) {
        self.compute.head_norm(x, rows, &norm.weight, norm.eps, head_size);
    }

    fn linears(
        &self,
        x: &Buffer,
        rows: usize,
        norm: Option<&Norm<Self>>,
        linears: &[&Linear],
        outs: &mut [&mut Buffer],
    ) {
        self.compute.linears(x, rows, norm.map(parts), linears, outs);
    }

    fn rope(&self, x: &mut Buffer, rows: usize, head_size: usize, cos: &Buffer, sin: &Buffer) {
        self.compute.rope(x, rows, head_size, cos, sin);
    }

    fn gate(&self, gate: &mut Buffer, up: &Buffer, rows: usize, activation: Activation) {
        self.compute.gate(gate, up, rows, activation);
    }

    fn add(&self, x: &mut Buffer, y: &Buffer, rows: usize) {
        self.compute.add(x, y, rows);
    }

    fn head(
        &self,
        x: &Buffer,
        picks: &[usize],
        norm: &Norm<Self>,
        table: &Tensor,
        out: &mut Buffer,
    ) {
        self.compute.head(x, picks, &norm.weight, norm.eps, table, out);
    }

    fn screened_head(
        &self,
        x: &Buffer,
        picks: &[Pick<'_>],
        norm: &Norm<Self>,
        table: &Tensor,
        screen: &Screen,
        outs: &mut [Vec<Candidate>],
    ) -> Result<(), Error> {
        self.compute.screened_head(x, picks, parts(norm), table, screen, outs);
        Ok(())
    }

    fn kv_allocate(&self, layout: KvLayout, blocks: usize) -> Result<KvStore, Error> {
        KvStore::new(layout, blocks)
    }

    fn kv_copy(&self, kv: &mut KvStore, pairs: &[(u32, u32)]) {
        for &(from, to) in pairs {
            kv.copy(from, to);
        }
    }

    fn kv_export(&self, kv: &KvStore, blocks: &[u32]) -> Result<Vec<u8>, Error> {
        let mut data = Vec::with_capacity(blocks.len() * kv.layout().block_bytes());
        for &block in blocks {
            kv.export(block, &mut data);
        }
        Ok(data)
    }

    fn kv_import(&self, kv: &mut KvStore, blocks: &[u32], data: &[u8]) -> Result<(), Error> {
        let bytes = kv.layout().block_bytes();
        if data.len() != blocks.len() * bytes {
            return Err(Error::KvImport(format!(
                "{} blocks take {} bytes but {} are given",
                blocks.len(),
                blocks.len() * bytes,
                data.len()
            )));
        }
        for (&block, data) in blocks.iter().zip(data.chunks_exact(bytes)) {
            kv.import(block, data);
        }
        Ok(())
    }

    fn kv_write(&self, kv: &mut KvStore, layer: usize, k: &Buffer, v: &Buffer, spans: &[Span<'_>]) {
        self.compute.kv_write(kv, layer, k, v, spans);
    }

    fn attention(
        &self,
        shape: AttentionShape,
        layer: usize,
        q: &Buffer,
        kv: &KvStore,
        spans: &[Span<'_>],
        out: &mut Buffer,
    ) {
        self.compute.attention(shape, layer, q, kv, spans, out);
    }

    fn gated_ffn(
        &self,
        x: &Buffer,
        rows: usize,
        norm: Option<&Norm<Self>>,
        ffn: &GatedFfn<Self>,
        scratch: &mut Scratch<Self>,
        out: &mut Buffer,
    ) {
        if [&ffn.gate, &ffn.up, &ffn.down].iter().any(|linear| linear.norm.is_some()) {
            return gated_ffn_by_parts(self, x, rows, norm, ffn, scratch, out);
        }
        let ffn = Ffn {
            norm: norm.map(parts),
            gate: &ffn.gate.weight,
            up: &ffn.up.weight,
            activation: ffn.activation,
            sub_norm: ffn.sub_norm.as_ref().map(parts),
            down: &ffn.down.weight,
        };
        self.compute.gated_ffn(x, rows, ffn, &mut scratch.gate, &mut scratch.up, out);
    }
}
