//! AVX-512 with VNNI: Intel since Ice Lake, AMD since Zen 4. CPUs with AVX-512 but without VNNI use
//! the AVX2 kernels.

use std::arch::x86_64::*;

use super::parts::*;
use super::{avx2, triples};

/// The kernels, if this CPU has the instructions: those that take compact layouts where it has VBMI too.
pub(super) fn kernels() -> Option<&'static Kernels> {
    static COMPACT: Kernels = Kernels {
        triples_int8: Some(triples::ternary_int8),
        sparse: &sparse::avx512::COMPACT,
        ..KERNELS
    };
    let plain = without_compact()?;
    Some(if is_x86_feature_detected!("avx512vbmi") { &COMPACT } else { plain })
}

/// The kernels of CPUs without VBMI, such as Cascade Lake.
pub(super) fn without_compact() -> Option<&'static Kernels> {
    let detected = avx2::detected()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni");
    detected.then_some(&KERNELS)
}

instantiate! {
    name: "avx512",
    ternary_int8: ternary_int8,
    sparse: sparse::avx512::TABLE,
    upper_bounds: screen::avx512::upper_bounds,
    lanes: Sixteen,
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
}

/// Sixteen f32 lanes.
#[derive(Clone, Copy)]
struct Sixteen(__m512);

impl Lanes for Sixteen {
    type Sums = __m512i;
    type Pairs = __m512i;
    const ROWS: usize = 8;
    const CHAINS: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn splat(x: f32) -> Self {
        Sixteen(_mm512_set1_ps(x))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(x: *const f32) -> Self {
        // SAFETY: sixteen elements, by the contract.
        unsafe { Sixteen(_mm512_loadu_ps(x)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_f16(x: *const [u8; 2]) -> Self {
        // SAFETY: sixteen elements of two bytes, by the contract.
        Sixteen(_mm512_cvtph_ps(unsafe { _mm256_loadu_si256(x.cast()) }))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_bf16(x: *const [u8; 2]) -> Self {
        // SAFETY: sixteen elements of two bytes, by the contract.
        let high = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(x.cast()) });
        Sixteen(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(high)))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store(self, out: *mut f32) {
        // SAFETY: room for sixteen elements, by the contract.
        unsafe { _mm512_storeu_ps(out, self.0) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn add(self, other: Self) -> Self {
        Sixteen(_mm512_add_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn mul(self, other: Self) -> Self {
        Sixteen(_mm512_mul_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn mul_add(self, factor: Self, sum: Self) -> Self {
        Sixteen(_mm512_fmadd_ps(self.0, factor.0, sum.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn add_product(self, a: f32, b: Self) -> Self {
        Sixteen(_mm512_fmadd_ps(_mm512_set1_ps(a), b.0, self.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn fold(lanes: [Self; 2]) -> f32 {
        let sixteen = _mm512_add_ps(lanes[0].0, lanes[1].0);
        let high = _mm512_extractf64x4_pd::<1>(_mm512_castps_pd(sixteen));
        let low = _mm512_castps512_ps256(sixteen);
        avx2::fold(_mm256_add_ps(low, _mm256_castpd_ps(high)))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn max(self, other: Self) -> Self {
        // The instruction takes its second operand unless the first is larger.
        Sixteen(_mm512_max_ps(self.0, other.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn fold_max(lanes: [Self; 2]) -> f32 {
        let sixteen = _mm512_max_ps(lanes[1].0, lanes[0].0);
        let high = _mm512_extractf64x4_pd::<1>(_mm512_castps_pd(sixteen));
        let low = _mm512_castps512_ps256(sixteen);
        avx2::fold_max(_mm256_max_ps(_mm256_castpd_ps(high), low))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn abs(self) -> Self {
        Sixteen(_mm512_abs_ps(self.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn power_of_two(self) -> Self {
        let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
        let one = _mm512_castps_si512(_mm512_set1_ps(1.0));
        Sixteen(_mm512_castsi512_ps(_mm512_add_epi32(exponent, one)))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn zero_where_less(self, x: Self, limit: Self) -> Self {
        let kept = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x.0, limit.0);
        Sixteen(_mm512_maskz_mov_ps(kept, self.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store_rounded(self, out: *mut i16) {
        let number = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(self.0, self.0);
        let rounded = _mm512_cvtepi32_epi16(_mm512_maskz_cvtps_epi32(number, self.0));
        // SAFETY: room for sixteen elements, by the contract.
        unsafe { _mm256_storeu_si256(out.cast(), rounded) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn no_sums() -> __m512i {
        _mm512_setzero_si512()
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_sums(x: *const i32) -> __m512i {
        // SAFETY: sixteen elements, by the contract.
        unsafe { _mm512_loadu_si512(x.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store_sums(sums: __m512i, out: *mut i32) {
        // SAFETY: room for sixteen elements, by the contract.
        unsafe { _mm512_storeu_si512(out.cast(), sums) }
    }

    #[inline]
    #[target_feature(enable = "avx512bw")]
    unsafe fn pairs(x: *const i8) -> __m512i {
        // SAFETY: thirty-two bytes, by the contract.
        _mm512_cvtepi8_epi16(unsafe { _mm256_loadu_si256(x.cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx512vnni")]
    unsafe fn add_pairs(sums: __m512i, a: i32, pairs: __m512i) -> __m512i {
        _mm512_dpwssd_epi32(sums, _mm512_set1_epi32(a), pairs)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn join_sums(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi32(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn from_sums(sums: __m512i) -> Self {
        Sixteen(_mm512_cvtepi32_ps(sums))
    }
}

/// See [`Kernels::ternary_int8`]. vpdpbusd sums in 32 bits, so nothing here can overflow before
/// the result does.
///
/// # Safety
/// `q` has the `16 * tiles.len()` elements from `t * stride` for each of the `acc.len()` tokens `t`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn ternary_int8(tiles: &[Tile], q: &[i8], stride: usize, acc: &mut [[i32; tile::ROWS]]) {
    let (q, next) = (q.as_ptr(), (tiles.as_ptr_range().end, tiles.len()));
    passes::in_passes(tiles, next, q, stride, acc, 8, |tiles, q, stride, acc| {
        // SAFETY: the elements are those of these tokens, by the contract of this function.
        unsafe {
            match acc.len() {
                8 => pass::<8, 1>(tiles, q, stride, acc),
                7 => pass::<7, 1>(tiles, q, stride, acc),
                6 => pass::<6, 1>(tiles, q, stride, acc),
                5 => pass::<5, 1>(tiles, q, stride, acc),
                4 => pass::<4, 1>(tiles, q, stride, acc),
                3 => pass::<3, 2>(tiles, q, stride, acc),
                2 => pass::<2, 2>(tiles, q, stride, acc),
                _ => pass::<1, 4>(tiles, q, stride, acc),
            }
        }
    });
}

/// One band against `T` tokens: a tile is one register of 16 rows, and each plane, shifted out once,
/// is multiplied with every token's four activations. With few tokens each has `CHAINS`
/// accumulators, so that one sum need not wait for the one before.
///
/// # Safety
/// As for [`ternary_int8`], with `T` tokens from `q`; `acc` has `T` elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn pass<const T: usize, const CHAINS: usize>(
    tiles: &[Tile],
    q: *const i8,
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
) {
    let mask = _mm512_set1_epi8(3);
    let mut sums = [[_mm512_setzero_si512(); CHAINS]; T];
    let mut q = q;
    for tile in tiles {
        // SAFETY: a tile has 64 bytes.
        let mut rows = unsafe { _mm512_loadu_si512(tile.as_ptr().cast()) };
        for plane in 0..4 {
            let codes = _mm512_and_si512(rows, mask);
            for (t, sums) in sums.iter_mut().enumerate() {
                // SAFETY: four of the activations that the contract promises.
                let four = unsafe { q.add(t * stride + 4 * plane).cast::<i32>().read_unaligned() };
                let chain = &mut sums[plane % CHAINS];
                *chain = _mm512_dpbusd_epi32(*chain, codes, _mm512_set1_epi32(four));
            }
            // Bits that cross a byte are masked off: a plane is at most at bit 6 of its byte.
            rows = _mm512_srli_epi16::<2>(rows);
        }
        q = q.wrapping_add(tile::COLS);
    }
    for (acc, sums) in acc.iter_mut().zip(sums) {
        let acc: *mut __m512i = acc.as_mut_ptr().cast();
        // SAFETY: `acc` has 16 32-bit elements.
        let mut sum = unsafe { _mm512_loadu_si512(acc) };
        for chain in sums {
            sum = _mm512_add_epi32(sum, chain);
        }
        // SAFETY: as above.
        unsafe { _mm512_storeu_si512(acc, sum) };
    }
}
