//! What an instruction set brings to attention and to the output head.

/// Sixteen f32 lanes, and the integer products behind int8.
///
/// Implementations are compiled with the instructions that they need, and taken into the kernels,
/// which have them all, by inlining.
///
/// # Safety of the functions
/// The CPU has the instructions of the implementation, and every pointer is to sixteen elements,
/// aligned or not.
pub(in crate::arch) trait Lanes: Copy {
    /// Sixteen 32-bit sums.
    type Sums: Copy;
    /// Two rows of sixteen 8-bit numbers, widened.
    type Pairs: Copy;
    /// Most rows of a register block: 1, 2, 3, 4, 6 or 8.
    const ROWS: usize;
    /// Sums per row that pairs are added to in turn, 1 or 2: so that none waits for the one before.
    const CHAINS: usize;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(x: *const f32) -> Self;
    unsafe fn load_f16(x: *const [u8; 2]) -> Self;
    /// From bfloat16, little-endian as half-precision numbers are.
    unsafe fn load_bf16(x: *const [u8; 2]) -> Self;
    unsafe fn store(self, out: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// `self * factor + sum`, fused.
    unsafe fn mul_add(self, factor: Self, sum: Self) -> Self;
    /// `self + a * b`, fused.
    unsafe fn add_product(self, a: f32, b: Self) -> Self;
    /// [`numerics::fold`](bitnet_core::numerics::fold) of 32 lanes, by addition.
    unsafe fn fold(lanes: [Self; 2]) -> f32;
    /// `self` where it is larger, and else `other`: that too where one of them is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// [`numerics::fold`](bitnet_core::numerics::fold) of 32 lanes that are not NaN, by maximum.
    unsafe fn fold_max(lanes: [Self; 2]) -> f32;
    unsafe fn abs(self) -> Self;
    /// `2^n`, where `self` is the sum of 1.5 * 2^23 and an integer `n` of -126 to 127; else anything.
    unsafe fn power_of_two(self) -> Self;
    /// `self`, but zero where `x` is less than `limit`.
    unsafe fn zero_where_less(self, x: Self, limit: Self) -> Self;
    /// Rounds to integers, halves to even; 0 for NaN. Others are within the range of `i16`.
    unsafe fn store_rounded(self, out: *mut i16);

    unsafe fn no_sums() -> Self::Sums;
    unsafe fn load_sums(x: *const i32) -> Self::Sums;
    unsafe fn store_sums(sums: Self::Sums, out: *mut i32);
    /// From thirty-two 8-bit numbers, sixteen pairs.
    unsafe fn pairs(x: *const i8) -> Self::Pairs;
    /// `sums + a.0 * pairs.0 + a.1 * pairs.1`, for `a` the two 16-bit halves of a word, low first.
    unsafe fn add_pairs(sums: Self::Sums, a: i32, pairs: Self::Pairs) -> Self::Sums;
    unsafe fn join_sums(a: Self::Sums, b: Self::Sums) -> Self::Sums;
    /// Rounded to the nearest f32.
    unsafe fn from_sums(sums: Self::Sums) -> Self;
}

/// A storage type that becomes f32 lanes as it is loaded.
pub(in crate::arch) trait Element<V>: Copy {
    /// # Safety
    /// As for [`Lanes`].
    unsafe fn load(x: *const Self) -> V;
}

impl<V: Lanes> Element<V> for f32 {
    #[inline(always)]
    unsafe fn load(x: *const f32) -> V {
        // SAFETY: passed on.
        unsafe { V::load(x) }
    }
}

/// Half precision.
impl<V: Lanes> Element<V> for [u8; 2] {
    #[inline(always)]
    unsafe fn load(x: *const [u8; 2]) -> V {
        // SAFETY: passed on.
        unsafe { V::load_f16(x) }
    }
}

/// A bfloat16, little-endian.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(in crate::arch) struct Bf16([u8; 2]);

impl<V: Lanes> Element<V> for Bf16 {
    #[inline(always)]
    unsafe fn load(x: *const Bf16) -> V {
        // SAFETY: passed on.
        unsafe { V::load_bf16(x.cast()) }
    }
}
