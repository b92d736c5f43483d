//! AVX2 with FMA and F16C: x86 CPUs since 2013.

use std::arch::asm;
use std::arch::x86_64::*;

use super::parts::*;

/// The kernels, if this CPU has the instructions.
pub(super) fn kernels() -> Option<&'static Kernels> {
    detected().then_some(&KERNELS)
}

/// Whether this CPU has all that this file is compiled for.
pub(super) fn detected() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

instantiate! {
    name: "avx2",
    ternary_int8: ternary_int8,
    sparse: sparse::avx2::TABLE,
    upper_bounds: screen::avx2::upper_bounds,
    lanes: Sixteen,
    #[target_feature(enable = "avx2,fma,f16c")]
}

/// Eight lanes, halves onto halves.
#[inline]
#[target_feature(enable = "avx")]
pub(super) fn fold(lanes: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// The largest of eight lanes that are not NaN.
#[inline]
#[target_feature(enable = "avx")]
pub(super) fn fold_max(lanes: __m256) -> f32 {
    let four = _mm_max_ps(_mm256_extractf128_ps::<1>(lanes), _mm256_castps256_ps128(lanes));
    let two = _mm_max_ps(_mm_movehl_ps(four, four), four);
    _mm_cvtss_f32(_mm_max_ss(_mm_movehdup_ps(two), two))
}

/// Sixteen f32 lanes.
#[derive(Clone, Copy)]
struct Sixteen([__m256; 2]);

impl Lanes for Sixteen {
    type Sums = [__m256i; 2];
    type Pairs = [__m256i; 2];
    // Eight sums, two registers of the panel, one of a row; eight sums are as many as keep two
    // multipliers of four cycles' latency busy.
    const ROWS: usize = 4;
    const CHAINS: usize = 1;

    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn splat(x: f32) -> Self {
        Sixteen([_mm256_set1_ps(x); 2])
    }

    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn load(x: *const f32) -> Self {
        // SAFETY: sixteen elements, by the contract.
        unsafe { Sixteen([_mm256_loadu_ps(x), _mm256_loadu_ps(x.add(8))]) }
    }

    #[inline]
    #[target_feature(enable = "f16c")]
    unsafe fn load_f16(x: *const [u8; 2]) -> Self {
        let x = x.cast::<__m128i>();
        // SAFETY: sixteen elements of two bytes, by the contract.
        let halves = unsafe { [_mm_loadu_si128(x), _mm_loadu_si128(x.add(1))] };
        Sixteen([_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])])
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_bf16(x: *const [u8; 2]) -> Self {
        let x = x.cast::<__m128i>();
        // SAFETY: sixteen elements of two bytes, by the contract.
        let halves = unsafe { [_mm_loadu_si128(x), _mm_loadu_si128(x.add(1))] };
        let high = [_mm256_cvtepu16_epi32(halves[0]), _mm256_cvtepu16_epi32(halves[1])];
        Sixteen([
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high[0])),
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high[1])),
        ])
    }

    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn store(self, out: *mut f32) {
        // SAFETY: room for sixteen elements, by the contract.
        unsafe {
            _mm256_storeu_ps(out, self.0[0]);
            _mm256_storeu_ps(out.add(8), self.0[1]);
        }
    }

    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn add(self, other: Self) -> Self {
        let (Sixteen(a), Sixteen(b)) = (self, other);
        Sixteen([_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])])
    }

    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn mul(self, other: Self) -> Self {
        let (Sixteen(a), Sixteen(b)) = (self, other);
        Sixteen([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }

    #[inline]
    #[target_feature(enable = "fma")]
    unsafe fn mul_add(self, factor: Self, sum: Self) -> Self {
        let (Sixteen(a), Sixteen(b), Sixteen(sum)) = (self, factor, sum);
        Sixteen([_mm256_fmadd_ps(a[0], b[0], sum[0]), _mm256_fmadd_ps(a[1], b[1], sum[1])])
    }

    #[inline]
    #[target_feature(enable = "fma")]
    unsafe fn add_product(self, a: f32, b: Self) -> Self {
        let (Sixteen(sum), Sixteen(b)) = (self, b);
        let a = _mm256_set1_ps(a);
        Sixteen([_mm256_fmadd_ps(a, b[0], sum[0]), _mm256_fmadd_ps(a, b[1], sum[1])])
    }

    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn fold(lanes: [Self; 2]) -> f32 {
        let [Sixteen(a), Sixteen(b)] = lanes;
        fold(_mm256_add_ps(_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])))
    }

    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn max(self, other: Self) -> Self {
        let (Sixteen(a), Sixteen(b)) = (self, other);
        // The instruction takes its second operand unless the first is larger.
        Sixteen([_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])])
    }

    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn fold_max(lanes: [Self; 2]) -> f32 {
        let [Sixteen(a), Sixteen(b)] = lanes;
        fold_max(_mm256_max_ps(_mm256_max_ps(b[1], a[1]), _mm256_max_ps(b[0], a[0])))
    }

    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn abs(self) -> Self {
        let sign = _mm256_set1_ps(-0.0);
        Sixteen([_mm256_andnot_ps(sign, self.0[0]), _mm256_andnot_ps(sign, self.0[1])])
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn power_of_two(self) -> Self {
        let one = _mm256_castps_si256(_mm256_set1_ps(1.0));
        let exponents = [
            _mm256_slli_epi32::<23>(_mm256_castps_si256(self.0[0])),
            _mm256_slli_epi32::<23>(_mm256_castps_si256(self.0[1])),
        ];
        Sixteen([
            _mm256_castsi256_ps(_mm256_add_epi32(exponents[0], one)),
            _mm256_castsi256_ps(_mm256_add_epi32(exponents[1], one)),
        ])
    }

    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn zero_where_less(self, x: Self, limit: Self) -> Self {
        let kept = [
            _mm256_cmp_ps::<_CMP_NLT_UQ>(x.0[0], limit.0[0]),
            _mm256_cmp_ps::<_CMP_NLT_UQ>(x.0[1], limit.0[1]),
        ];
        Sixteen([_mm256_and_ps(kept[0], self.0[0]), _mm256_and_ps(kept[1], self.0[1])])
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn store_rounded(self, out: *mut i16) {
        let Sixteen([low, high]) = self;
        let numbers =
            [_mm256_cmp_ps::<_CMP_ORD_Q>(low, low), _mm256_cmp_ps::<_CMP_ORD_Q>(high, high)];
        let low = _mm256_cvtps_epi32(_mm256_and_ps(numbers[0], low));
        let high = _mm256_cvtps_epi32(_mm256_and_ps(numbers[1], high));
        // Packed within halves: low, high, low, high of four each.
        let packed = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
        // SAFETY: room for sixteen elements, by the contract.
        unsafe { _mm256_storeu_si256(out.cast(), packed) }
    }

    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn no_sums() -> Self::Sums {
        [_mm256_setzero_si256(); 2]
    }

    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn load_sums(x: *const i32) -> Self::Sums {
        let x = x.cast::<__m256i>();
        // SAFETY: sixteen elements, by the contract.
        unsafe { [_mm256_loadu_si256(x), _mm256_loadu_si256(x.add(1))] }
    }

    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn store_sums(sums: Self::Sums, out: *mut i32) {
        let out = out.cast::<__m256i>();
        // SAFETY: room for sixteen elements, by the contract.
        unsafe {
            _mm256_storeu_si256(out, sums[0]);
            _mm256_storeu_si256(out.add(1), sums[1]);
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn pairs(x: *const i8) -> Self::Pairs {
        let x = x.cast::<__m128i>();
        // SAFETY: thirty-two bytes, by the contract.
        let halves = unsafe { [_mm_loadu_si128(x), _mm_loadu_si128(x.add(1))] };
        [_mm256_cvtepi8_epi16(halves[0]), _mm256_cvtepi8_epi16(halves[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn add_pairs(sums: Self::Sums, a: i32, pairs: Self::Pairs) -> Self::Sums {
        let a = _mm256_set1_epi32(a);
        [
            _mm256_add_epi32(sums[0], _mm256_madd_epi16(a, pairs[0])),
            _mm256_add_epi32(sums[1], _mm256_madd_epi16(a, pairs[1])),
        ]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn join_sums(a: Self::Sums, b: Self::Sums) -> Self::Sums {
        [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])]
    }

    #[inline]
    #[target_feature(enable = "avx")]
    unsafe fn from_sums(sums: Self::Sums) -> Self {
        Sixteen([_mm256_cvtepi32_ps(sums[0]), _mm256_cvtepi32_ps(sums[1])])
    }
}

/// Tiles whose products a 16-bit lane can sum: vpmaddubsw adds two products of a code (at most 2)
/// and an activation (-128..=127), hence at least -512 and at most 508; a lane gets one such sum
/// per plane of a tile, and 64 of them reach -32 768, the very end of its range. vpmaddubsw itself
/// never saturates.
const TILES_PER_WIDENING: usize = 16;

/// Tokens of one pass: their ten accumulators leave six registers for codes, activations and products.
const TOKENS_PER_PASS: usize = 5;

/// Tokens from which unpacking codes to memory costs less than unpacking them for each pass.
const UNPACK_FROM: usize = 4 * TOKENS_PER_PASS;

/// See [`Kernels::ternary_int8`].
///
/// # Safety
/// `q` has the `16 * tiles.len()` elements from `t * stride` for each of the `acc.len()` tokens `t`.
#[target_feature(enable = "avx2")]
unsafe fn ternary_int8(tiles: &[Tile], q: &[i8], stride: usize, acc: &mut [[i32; tile::ROWS]]) {
    if acc.len() >= UNPACK_FROM {
        let (q, unpack) = (q.as_ptr(), |tile: &Tile| unpack(tile));
        passes::in_blocks(
            tiles,
            q,
            stride,
            acc,
            TOKENS_PER_PASS,
            unpack,
            |tiles, q, stride, acc| {
                // SAFETY: the elements are those of these tokens, by the contract of this function.
                unsafe { unpacked_pass_of_few(tiles, q, stride, acc) };
            },
        );
        return;
    }
    let mut start = q.as_ptr();
    let tokens = passes::evenly(acc.len(), TOKENS_PER_PASS);
    for group in acc.chunks_mut(tokens) {
        // SAFETY: the elements are those of these tokens, by the contract of this function.
        unsafe {
            match group.len() {
                5 => pass::<5>(tiles, start, stride, group),
                4 => pass::<4>(tiles, start, stride, group),
                3 => pass::<3>(tiles, start, stride, group),
                2 => pass::<2>(tiles, start, stride, group),
                _ => pass::<1>(tiles, start, stride, group),
            }
        }
        start = start.wrapping_add(tokens * stride);
    }
}

/// The two halves of a tile, eight rows each.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_tile(tile: &Tile) -> [__m256i; 2] {
    let start = tile.as_ptr().cast::<__m256i>();
    // SAFETY: a tile has 64 bytes.
    unsafe { [_mm256_loadu_si256(start), _mm256_loadu_si256(start.add(1))] }
}

/// The sums of eight rows each.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load_rows(rows: &[i32; tile::ROWS]) -> [__m256i; 2] {
    let start = rows.as_ptr().cast::<__m256i>();
    // SAFETY: 16 32-bit elements, two registers of eight.
    unsafe { [_mm256_loadu_si256(start), _mm256_loadu_si256(start.add(1))] }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn store_rows(rows: &mut [i32; tile::ROWS], sums: [__m256i; 2]) {
    let start = rows.as_mut_ptr().cast::<__m256i>();
    // SAFETY: 16 32-bit elements, two registers of eight.
    unsafe {
        _mm256_storeu_si256(start, sums[0]);
        _mm256_storeu_si256(start.add(1), sums[1]);
    }
}

/// A tile with a byte per code: eight registers, two halves of the rows for each plane.
type UnpackedTile = [[__m256i; 2]; 4];

#[inline]
#[target_feature(enable = "avx2")]
fn unpack(tile: &Tile) -> UnpackedTile {
    let mask = _mm256_set1_epi8(3);
    let rows = load_tile(tile);
    // Bits that cross a byte are masked off: a plane is at most at bit 6 of its byte.
    [
        rows.map(|rows| _mm256_and_si256(rows, mask)),
        rows.map(|rows| _mm256_and_si256(_mm256_srli_epi16::<2>(rows), mask)),
        rows.map(|rows| _mm256_and_si256(_mm256_srli_epi16::<4>(rows), mask)),
        rows.map(|rows| _mm256_and_si256(_mm256_srli_epi16::<6>(rows), mask)),
    ]
}

/// `_mm256_add_epi16` that stays where it is: the compiler takes sums of several planes together
/// otherwise, for which the registers do not suffice.
#[inline]
#[target_feature(enable = "avx2")]
fn add_in_order(mut sum: __m256i, pairs: __m256i) -> __m256i {
    // SAFETY: an instruction on registers alone, which the enclosing function's features include.
    unsafe {
        asm!(
            "vpaddw {sum}, {sum}, {pairs}",
            sum = inout(ymm_reg) sum,
            pairs = in(ymm_reg) pairs,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Adds the products of a plane's codes with the activations of `T` tokens to 16-bit sums of pairs,
/// two lanes per row. vpbroadcastd spreads a token's four activations over the rows.
///
/// # Safety
/// `q` points to four activations of the first token, those of the others follow at `stride`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_plane<const T: usize>(
    narrow: &mut [[__m256i; 2]; T],
    codes: [__m256i; 2],
    q: *const i8,
    stride: usize,
) {
    for (t, narrow) in narrow.iter_mut().enumerate() {
        // SAFETY: four activations, by the contract.
        let four = unsafe { q.add(t * stride).cast::<i32>().read_unaligned() };
        let four = _mm256_set1_epi32(four);
        for half in 0..2 {
            let pairs = _mm256_maddubs_epi16(codes[half], four);
            narrow[half] = add_in_order(narrow[half], pairs);
        }
    }
}

/// `sums` plus the pairs of lanes of `narrow`.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(sums: [__m256i; 2], narrow: [__m256i; 2]) -> [__m256i; 2] {
    let ones = _mm256_set1_epi16(1);
    std::array::from_fn(|half| _mm256_add_epi32(sums[half], _mm256_madd_epi16(narrow[half], ones)))
}

/// [`unpacked_pass`] with the number of tokens of `acc`, at most [`TOKENS_PER_PASS`].
///
/// # Safety
/// As for [`unpacked_pass`].
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn unpacked_pass_of_few(
    codes: &[UnpackedTile],
    q: *const i8,
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
) {
    // SAFETY: the same contract.
    unsafe {
        match acc.len() {
            5 => unpacked_pass::<5>(codes, q, stride, acc),
            4 => unpacked_pass::<4>(codes, q, stride, acc),
            3 => unpacked_pass::<3>(codes, q, stride, acc),
            2 => unpacked_pass::<2>(codes, q, stride, acc),
            _ => unpacked_pass::<1>(codes, q, stride, acc),
        }
    }
}

/// Adds the products of a block of unpacked tiles with `T` tokens to `acc`.
///
/// # Safety
/// `q` points to the `16 * codes.len()` elements of the first token, the others follow at `stride`;
/// `acc` has `T` elements.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn unpacked_pass<const T: usize>(
    codes: &[UnpackedTile],
    q: *const i8,
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
) {
    let mut q = q;
    for run in codes.chunks(TILES_PER_WIDENING) {
        let mut narrow = [[_mm256_setzero_si256(); 2]; T];
        for tile in run {
            for (plane, codes) in tile.iter().enumerate() {
                // SAFETY: activations that the contract promises.
                unsafe { add_plane(&mut narrow, *codes, q.add(4 * plane), stride) };
            }
            q = q.wrapping_add(tile::COLS);
        }
        for (acc, narrow) in acc.iter_mut().zip(narrow) {
            store_rows(acc, widen(load_rows(acc), narrow));
        }
    }
}

/// One band against `T` tokens. A tile is two registers of eight rows; each plane is shifted out
/// once and multiplied with every token's four activations.
///
/// # Safety
/// As for [`ternary_int8`], with `T` tokens from `q`; `acc` has `T` elements.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn pass<const T: usize>(
    tiles: &[Tile],
    q: *const i8,
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
) {
    let mask = _mm256_set1_epi8(3);
    let mut wide: [[__m256i; 2]; T] = std::array::from_fn(|t| load_rows(&acc[t]));
    let mut q = q;
    for run in tiles.chunks(TILES_PER_WIDENING) {
        let mut narrow = [[_mm256_setzero_si256(); 2]; T];
        for tile in run {
            let mut rows = load_tile(tile);
            for plane in 0..4 {
                let codes = rows.map(|rows| _mm256_and_si256(rows, mask));
                // SAFETY: activations that the contract promises.
                unsafe { add_plane(&mut narrow, codes, q.add(4 * plane), stride) };
                // Bits that cross a byte are masked off: a plane is at most at bit 6 of its byte.
                rows = rows.map(|rows| _mm256_srli_epi16::<2>(rows));
            }
            q = q.wrapping_add(tile::COLS);
        }
        for (wide, narrow) in wide.iter_mut().zip(narrow) {
            *wide = widen(*wide, narrow);
        }
    }
    for (acc, wide) in acc.iter_mut().zip(wide) {
        store_rows(acc, wide);
    }
}
