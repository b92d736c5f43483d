//! The inner loops, per instruction set. Slices outside, pointers inside.
//!
//! The float kernels are written once, in [`generic`], from the recipes of
//! [`bitnet_core::numerics`]; each instruction set compiles its own copy of them (the macro
//! [`instantiate`]), which the compiler vectorises. Strict IEEE semantics and fused multiply-adds
//! make all copies give the same bits. [`attention`] and the output head ([`head`]) are written once
//! too, but over vectors that each instruction set brings ([`lanes`]). Only the integer product of
//! ternary weights, whose instructions no compiler finds by itself, is written by hand for each;
//! `triples` has that of weights in fewer bits, [`sparse`] the products of chosen rows or columns
//! alone, [`screen`] those of the screened output head.
//!
//! [`Kernels`] is the table of one instruction set. A table is handed out only by
//! [`for_isa`](Kernels::for_isa), after the CPU was asked, so that holding one proves that its
//! functions can run here.

mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
pub(crate) mod ceilings;
mod generic;
mod head;
mod lanes;
#[cfg(target_arch = "aarch64")]
mod neon;
mod passes;
mod scalar;
mod screen;
mod sparse;
#[cfg(target_arch = "x86_64")]
mod triples;

use bitnet_core::DType;
use bitnet_core::backend::Activation;
use bitnet_quant::activation::QuantizedRow;
use bitnet_quant::packing::tile::triples::{BLOCK_COLS, Block};
use bitnet_quant::packing::tile::{self, Tile};

use crate::Isa;

pub(crate) use attention::{
    Attention, KvData, PANEL, Room, Slabs, pair_place, panel_place, partial_len, room_len,
};
pub(crate) use generic::{BandScale, OutputScale};
pub(crate) use head::HeadRow;
pub(crate) use sparse::{Runs, planes_len, spread};

/// The weights of sixteen rows (see [`bitnet_quant::packing::tile`]): blocks of triples, if there are any,
/// and then tiles.
#[derive(Clone, Copy)]
pub(crate) struct Band<'a> {
    pub(crate) blocks: &'a [Block],
    pub(crate) tiles: &'a [Tile],
}

type TernaryInt8 = unsafe fn(&[Tile], &[i8], usize, &mut [[i32; tile::ROWS]]);
type TriplesInt8 = unsafe fn(Band<'_>, &[i8], usize, &mut [[i32; tile::ROWS]]);
type NormQuantize = unsafe fn(&[f32], &[f32], f32, &mut [f32], &mut [i8]) -> QuantizedRow;
type TernaryF32 = unsafe fn(&[Tile], &[f32], usize, &mut [[f32; tile::ROWS]]);

/// Asks for a line of memory that is soon read or written. The address need not be a valid one.
#[inline(always)]
pub(crate) fn prefetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a hint, which never faults. The intrinsic is not stable yet.
    unsafe {
        std::arch::asm!(
            "prfm pldl1keep, [{address}]",
            address = in(reg) address,
            options(readonly, nostack, preserves_flags),
        );
    }
}

/// As [`prefetch`], but no nearer than the second-level cache, which can wait for more of memory.
#[inline(always)]
pub(crate) fn prefetch_second<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(address.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a hint, which never faults. The intrinsic is not stable yet.
    unsafe {
        std::arch::asm!(
            "prfm pldl2keep, [{address}]",
            address = in(reg) address,
            options(readonly, nostack, preserves_flags),
        );
    }
}

/// Bytes that a cache asks memory for at once.
const LINE: usize = 64;

/// The smallest page of memory of these processors.
const PAGE: usize = 4096;

/// Asks for a line of every page with some of `data`: what is asked for in a page that the processor
/// has not met lately waits until its address is looked up.
pub(crate) fn prefetch_pages<T>(data: &[T]) {
    let step = PAGE / size_of::<T>();
    data.iter().step_by(step).chain(data.last()).for_each(|item| prefetch_second(item));
}

/// Asks for all of `data`.
pub(crate) fn prefetch_all<T>(data: &[T]) {
    prefetch_pages(data);
    data.iter().step_by(LINE / size_of::<T>()).for_each(|item| prefetch_second(item));
}

/// The kernels of one instruction set.
pub(crate) struct Kernels {
    /// What [`Backend::name`](bitnet_core::backend::Backend::name) shows.
    pub(crate) name: &'static str,
    ternary_int8: TernaryInt8,
    triples_int8: Option<TriplesInt8>,
    upper_bounds: screen::UpperBounds,
    ternary_f32: TernaryF32,
    rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    quantize_row: unsafe fn(&[f32], &mut [i8]) -> QuantizedRow,
    norm_quantize: NormQuantize,
    rope: unsafe fn(&mut [f32], usize, &[f32], &[f32]),
    to_float: unsafe fn(&[[i32; tile::ROWS]], &mut [[f32; tile::ROWS]]),
    scale_sums: unsafe fn(&mut [[f32; tile::ROWS]], &[f32], BandScale<'_>),
    scale_outputs: unsafe fn(&[i32], f32, OutputScale<'_>, &mut [f32]),
    add_scaled: unsafe fn(&[f32; tile::ROWS], &[f32; tile::ROWS], &mut [f32; tile::ROWS]),
    quantize_head: unsafe fn(&[f32], &mut [i8]) -> f32,
    gate: unsafe fn(Activation, &mut [f32], &[f32]),
    add: unsafe fn(&mut [f32], &[f32]),
    decode: unsafe fn(DType, &[u8], &mut [f32]),
    head_row: unsafe fn(HeadRow<'_>, &mut [f32], &mut [f32]),
    attend: unsafe fn(&Attention<'_>, usize, Room<'_>, &mut [f32]),
    merge: unsafe fn(usize, &mut [f32], &[f32]),
    finish: unsafe fn(usize, &[f32], &mut [f32]),
    sparse: &'static sparse::Table,
}

impl Kernels {
    /// The kernels for `isa`, if this CPU can run them.
    pub(crate) fn for_isa(isa: Isa) -> Option<&'static Kernels> {
        match isa {
            Isa::Scalar => Some(scalar::kernels()),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::kernels(),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => avxvnni::kernels(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::kernels(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::kernels(),
            #[allow(unreachable_patterns)] // on no architecture are all of them there
            _ => None,
        }
    }

    /// Whether these kernels take weights in fewer than two bits: bands with blocks of triples, and
    /// runs in quintuples. That is worth it where decoding them is faster than reading more bytes.
    pub(crate) fn take_compact(&self) -> bool {
        self.triples_int8.is_some() && self.sparse.takes_quintuples()
    }

    /// `acc[t][r] += sum over k of code(r, k) * q[t * stride + k]`, exactly, for the 16 rows and all
    /// columns of a band; a code is a weight plus 1, so that sums of weights come out where `acc[t]`
    /// held minus the sum of `q[t * stride + k]`. Columns of padding must meet zeros in `q`.
    ///
    /// # Panics
    /// If `q` is too short, or the band has blocks that these kernels do not take.
    pub(crate) fn ternary_int8(
        &self,
        band: Band<'_>,
        q: &[i8],
        stride: usize,
        acc: &mut [[i32; tile::ROWS]],
    ) {
        let Some(last) = acc.len().checked_sub(1) else { return };
        let Band { blocks, tiles } = band;
        let columns = blocks.len() * BLOCK_COLS + tiles.len() * tile::COLS;
        assert!(last * stride + columns <= q.len());
        if blocks.is_empty() {
            // SAFETY: the CPU has the instructions (see `Kernels`), and `q` has every element that
            // the kernels read, as just checked.
            return unsafe { (self.ternary_int8)(tiles, q, stride, acc) };
        }
        let triples_int8 = self.triples_int8.expect("kernels that take triples");
        // SAFETY: as above.
        unsafe { triples_int8(band, q, stride, acc) }
    }

    /// `sums[t][r] = sum over k of weight(r, k) * x[t * stride + k]` in four accumulators by
    /// `k % 4`, for the 16 rows of a band and the columns of `tiles`. Columns of padding must meet
    /// zeros in `x`.
    ///
    /// # Panics
    /// If `x` is too short.
    pub(crate) fn ternary_f32(
        &self,
        tiles: &[Tile],
        x: &[f32],
        stride: usize,
        sums: &mut [[f32; tile::ROWS]],
    ) {
        // SAFETY: the CPU has the instructions (see `Kernels`); the function itself is safe code.
        unsafe { (self.ternary_f32)(tiles, x, stride, sums) }
    }
}

/// Safe methods for kernels that are safe code but for the instructions they are compiled to.
macro_rules! methods {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        impl Kernels {
            $($(#[$doc])*
            pub(crate) fn $name(&self, $($arg: $type),*) $(-> $result)? {
                // SAFETY: the CPU has the instructions (see `Kernels`); the function itself is
                // safe code.
                unsafe { (self.$name)($($arg),*) }
            })*
        }
    };
}

methods! {
    /// [`bitnet_core::numerics::rms_norm`].
    rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]);
    /// [`bitnet_quant::activation::quantize_row`].
    quantize_row(x: &[f32], q: &mut [i8]) -> QuantizedRow;
    /// [`rms_norm`](Kernels::rms_norm) into `room`, and then
    /// [`quantize_row`](Kernels::quantize_row).
    norm_quantize(
        x: &[f32],
        weight: &[f32],
        eps: f32,
        room: &mut [f32],
        q: &mut [i8]
    ) -> QuantizedRow;
    /// `sums = acc`, as floats.
    to_float(acc: &[[i32; tile::ROWS]], sums: &mut [[f32; tile::ROWS]]);
    /// Applies the scales of a band to the sums of some tokens, whose activation scales are given.
    scale_sums(sums: &mut [[f32; tile::ROWS]], s_x: &[f32], scale: BandScale<'_>);
    /// One token's outputs from their exact sums and the activation scale.
    scale_outputs(sums: &[i32], s_x: f32, scale: OutputScale<'_>, out: &mut [f32]);
    /// `totals[r] += scales[r] * sums[r]`, fused: one scale group of a band.
    add_scaled(
        scales: &[f32; tile::ROWS],
        sums: &[f32; tile::ROWS],
        totals: &mut [f32; tile::ROWS]
    );
    /// Rounds one head's key or value to int8 and returns its scale, `absmax / 127`.
    quantize_head(x: &[f32], q: &mut [i8]) -> f32;
    /// Rotates each head of a row: `x`, head size, cosines, sines.
    rope(x: &mut [f32], head_size: usize, cos: &[f32], sin: &[f32]);
    /// `gate = activation(gate) * up`.
    gate(activation: Activation, gate: &mut [f32], up: &[f32]);
    /// `x += y`.
    add(x: &mut [f32], y: &[f32]);
    /// [`bitnet_quant::packing::blocks::decode_row`].
    decode(dtype: DType, bytes: &[u8], out: &mut [f32]);
    /// `out[t] = row · inputs[t]`; `decoded` is room for one row.
    head_row(row: HeadRow<'_>, decoded: &mut [f32], out: &mut [f32]);
    /// Attention over the keys of one split, into `partials` `[tokens * shared,
    /// partial_len(head_size)]`; `room` is as large as `room_len` says.
    attend(attention: &Attention<'_>, split: usize, room: Room<'_>, partials: &mut [f32]);
    /// Joins the partial results of a later split to `totals`.
    merge(head_size: usize, totals: &mut [f32], parts: &[f32]);
    /// Turns the joined results of all splits into attention outputs.
    finish(head_size: usize, totals: &[f32], out: &mut [f32]);
}

/// Compiles the generic kernels for an instruction set and makes its table, `KERNELS`.
macro_rules! instantiate {
    (
        name: $name:expr,
        ternary_int8: $ternary_int8:path,
        sparse: $sparse:path,
        upper_bounds: $upper_bounds:path,
        lanes: $lanes:ty,
        $(#[$features:meta])?
    ) => {
        $(#[$features])?
        fn ternary_f32(tiles: &[Tile], x: &[f32], stride: usize, sums: &mut [[f32; tile::ROWS]]) {
            generic::ternary_f32(tiles, x, stride, sums);
        }
        $(#[$features])?
        fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
            numerics::rms_norm(x, weight, eps, out);
        }
        $(#[$features])?
        fn quantize_row(x: &[f32], q: &mut [i8]) -> QuantizedRow {
            activation::quantize_row(x, q)
        }
        $(#[$features])?
        fn norm_quantize(
            x: &[f32],
            weight: &[f32],
            eps: f32,
            room: &mut [f32],
            q: &mut [i8],
        ) -> QuantizedRow {
            numerics::rms_norm(x, weight, eps, room);
            activation::quantize_row(room, q)
        }
        $(#[$features])?
        fn to_float(acc: &[[i32; tile::ROWS]], sums: &mut [[f32; tile::ROWS]]) {
            generic::to_float(acc, sums);
        }
        $(#[$features])?
        fn scale_sums(sums: &mut [[f32; tile::ROWS]], s_x: &[f32], scale: BandScale<'_>) {
            generic::scale_sums(sums, s_x, scale);
        }
        $(#[$features])?
        fn scale_outputs(sums: &[i32], s_x: f32, scale: OutputScale<'_>, out: &mut [f32]) {
            generic::scale_outputs(sums, s_x, scale, out);
        }
        $(#[$features])?
        fn add_scaled(
            scales: &[f32; tile::ROWS],
            sums: &[f32; tile::ROWS],
            totals: &mut [f32; tile::ROWS],
        ) {
            for (total, (scale, sum)) in totals.iter_mut().zip(scales.iter().zip(sums)) {
                *total = scale.mul_add(*sum, *total);
            }
        }
        $(#[$features])?
        fn quantize_head(x: &[f32], q: &mut [i8]) -> f32 {
            generic::quantize_head(x, q)
        }
        $(#[$features])?
        fn rope(x: &mut [f32], head_size: usize, cos: &[f32], sin: &[f32]) {
            generic::rope(x, head_size, cos, sin);
        }
        $(#[$features])?
        fn gate(activation: Activation, gate: &mut [f32], up: &[f32]) {
            generic::gate(activation, gate, up);
        }
        $(#[$features])?
        fn add(x: &mut [f32], y: &[f32]) {
            generic::add(x, y);
        }
        $(#[$features])?
        fn decode(dtype: DType, bytes: &[u8], out: &mut [f32]) {
            head::decode::<$lanes>(dtype, bytes, out);
        }
        $(#[$features])?
        fn head_row(row: HeadRow<'_>, decoded: &mut [f32], out: &mut [f32]) {
            head::head_row::<$lanes>(row, decoded, out);
        }
        $(#[$features])?
        fn attend(
            attention: &Attention<'_>,
            split: usize,
            room: Room<'_>,
            partials: &mut [f32],
        ) {
            attention::attend::<$lanes>(attention, split, room, partials);
        }
        $(#[$features])?
        fn merge(head_size: usize, totals: &mut [f32], parts: &[f32]) {
            attention::merge(head_size, totals, parts);
        }
        $(#[$features])?
        fn finish(head_size: usize, totals: &[f32], out: &mut [f32]) {
            attention::finish(head_size, totals, out);
        }

        pub(super) static KERNELS: Kernels = Kernels {
            name: $name,
            ternary_int8: $ternary_int8,
            triples_int8: None,
            upper_bounds: $upper_bounds,
            ternary_f32,
            rms_norm,
            quantize_row,
            norm_quantize,
            to_float,
            scale_sums,
            scale_outputs,
            add_scaled,
            quantize_head,
            rope,
            gate,
            add,
            decode,
            head_row,
            attend,
            merge,
            finish,
            sparse: &$sparse,
        };
    };
}
use instantiate;

/// What [`instantiate`] names, for the files that use it.
mod parts {
    pub(super) use super::attention::{self, Attention, Room};
    pub(super) use super::lanes::Lanes;
    pub(super) use super::{
        BandScale, HeadRow, Kernels, OutputScale, Tile, generic, head, instantiate, passes, screen,
        sparse, tile,
    };

    pub(super) use bitnet_core::backend::Activation;
    pub(super) use bitnet_core::{DType, numerics};
    pub(super) use bitnet_quant::activation::{self, QuantizedRow};
}

#[cfg(test)]
mod tests {
    use bitnet_quant::packing::tile::triples;
    use bitnet_testing::Random;

    use super::*;

    /// Every table that this CPU can run, also those that a better one of the same level hides.
    pub(super) fn all_kernels() -> Vec<&'static Kernels> {
        let levels = Isa::ALL.map(|isa| (isa.to_string(), Kernels::for_isa(isa)));
        #[cfg(target_arch = "aarch64")]
        let variants = neon::variants()
            .map(|(kernels, detected)| (kernels.name.to_owned(), detected.then_some(kernels)));
        #[cfg(target_arch = "x86_64")]
        let variants = [
            ("avx512 in place of avxvnni".to_owned(), avxvnni::stand_in()),
            ("avx512 without compact layouts".to_owned(), avx512::without_compact()),
        ];
        #[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
        let variants: [(String, Option<&Kernels>); 0] = [];
        let tables = levels.into_iter().chain(variants);
        tables
            .filter_map(|(name, kernels)| {
                if kernels.is_none() {
                    println!("skipped: this CPU has no {name}");
                }
                kernels
            })
            .collect()
    }

    fn band(tiles: &[Tile]) -> Band<'_> {
        Band { blocks: &[], tiles }
    }

    fn exact(tiles: &[Tile], q: &[i8]) -> [i32; 16] {
        std::array::from_fn(|row| {
            q.iter()
                .enumerate()
                .map(|(k, &q)| {
                    i32::from(tile::tile_code(&tiles[k / 16], row, k % 16)) * i32::from(q)
                })
                .sum()
        })
    }

    #[test]
    fn narrow_sums_hold_at_their_fullest() {
        // All codes 2, all activations at an end of their range, at lengths around every widening
        // limit; and alternating signs of runs, so that a sum that wrapped is not wrapped back.
        for kernels in all_kernels() {
            for count in [1, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100] {
                let tiles = vec![[0b10_10_10_10u8; 64]; count];
                for fill in [-128i8, 127] {
                    for tokens in [1, 2, 3, 4, 5, 7, 8, 9, 13] {
                        let q = vec![fill; count * 16 * tokens];
                        let mut acc = vec![[-3; 16]; tokens];
                        kernels.ternary_int8(band(&tiles), &q, count * 16, &mut acc);
                        let all = 2 * i32::from(fill) * (count * 16) as i32 - 3;
                        assert_eq!(acc, vec![[all; 16]; tokens], "{} {count}", kernels.name);
                    }
                }
            }
        }
    }

    #[test]
    fn integer_sums_are_exact_for_every_count_of_tokens_and_tiles() {
        let mut state = 1u32;
        let mut next = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 16
        };
        let all = all_kernels();
        for count in [1, 2, 3, 16, 21, 40, 65, 130] {
            let tiles: Vec<Tile> = (0..count)
                .map(|_| {
                    std::array::from_fn(|_| {
                        let codes: [u8; 4] = std::array::from_fn(|_| (next() % 3) as u8);
                        codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
                    })
                })
                .collect();
            let stride = count * 16 + 5;
            let q: Vec<i8> = (0..stride * 25).map(|_| next() as i8).collect();
            for tokens in 1..=24 {
                let expected: Vec<[i32; 16]> =
                    (0..tokens).map(|t| exact(&tiles, &q[t * stride..][..count * 16])).collect();
                for kernels in &all {
                    let mut acc = vec![[0; 16]; tokens];
                    kernels.ternary_int8(band(&tiles), &q, stride, &mut acc);
                    assert_eq!(acc, expected, "{}, {tokens} tokens, {count} tiles", kernels.name);
                }
            }
        }
    }

    /// A block of the same triple everywhere, and one of random bytes: numbers that are no triples have
    /// codes too, the same as where they are unpacked.
    #[test]
    fn sums_of_triples_are_those_of_their_tiles() {
        let mut random = Random::new(7);
        let mut next = || random.bits();
        let all = all_kernels();
        for count in [1, 2, 3, 26, 72] {
            // All triples 26: 2 in the low three bits of the three that lie across lines, and 3 above.
            let high = [2 << 5, 0b111 << 5, 2 << 5, 0b111 << 5, 2 << 5];
            let fullest: Block = std::array::from_fn(|i| 26 | high[i / tile::LINE]);
            let fullest_tiles = [[0b10_10_10_10; tile::BYTES]; triples::BLOCK_TILES];
            let mut unpacked = fullest_tiles.map(|_| [0; tile::BYTES]);
            triples::unpack_band((&[fullest], &[]), &mut unpacked);
            assert_eq!(unpacked, fullest_tiles);
            let random: Vec<Block> =
                (0..count).map(|_| std::array::from_fn(|_| next() as u8)).collect();
            for (blocks, fill) in [
                (random, None),
                (vec![fullest; count], Some(127)),
                (vec![fullest; count], Some(-128)),
            ] {
                let mut tiles = vec![[0; tile::BYTES]; triples::BLOCK_TILES * count];
                triples::unpack_band((&blocks, &[]), &mut tiles);
                let stride = count * triples::BLOCK_COLS + 5;
                let q: Vec<i8> = (0..stride * 25).map(|_| fill.unwrap_or(next() as i8)).collect();
                for tokens in (1..=17).chain([24]) {
                    let expected: Vec<[i32; 16]> = (0..tokens)
                        .map(|t| {
                            let q = &q[t * stride..][..count * triples::BLOCK_COLS];
                            exact(&tiles, q).map(|sum| sum - 3)
                        })
                        .collect();
                    for kernels in &all {
                        if kernels.triples_int8.is_none() {
                            continue;
                        }
                        // The last block once more as the tiles that it is made of.
                        for blocks in [&blocks[..], &blocks[..count - 1]] {
                            let tiles = &tiles[triples::BLOCK_TILES * blocks.len()..];
                            let mut acc = vec![[-3; 16]; tokens];
                            kernels.ternary_int8(Band { blocks, tiles }, &q, stride, &mut acc);
                            let case = format!("{}, {tokens} tokens, {count} blocks", kernels.name);
                            assert_eq!(acc, expected, "{case}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "assertion failed")]
    fn activations_that_end_early_are_refused() {
        let kernels = Kernels::for_isa(Isa::Scalar).unwrap();
        kernels.ternary_int8(band(&[[0; 64]; 2]), &[0; 50], 20, &mut [[0; 16]; 2]);
    }
}
