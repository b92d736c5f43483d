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
    /// Two rows of sixteen 8-bit numbers, widened and interleaved.
    type Pairs: Copy;
    /// Most rows of a register block: 1, 2, 3, 4, 6 or 8.
    const ROWS: usize;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(x: *const f32) -> Self;
    unsafe fn load_f16(x: *const [u8; 2]) -> Self;
    /// From bfloat16, little-endian as half-precision numbers are.
    unsafe fn load_bf16(x: *const [u8; 2]) -> Self;
    unsafe fn store(self, out: *mut f32);
    unsafe fn mul(self, other: Self) -> Self;
    /// `self * factor + sum`, fused.
    unsafe fn mul_add(self, factor: Self, sum: Self) -> Self;
    /// `self + a * b`, fused.
    unsafe fn add_product(self, a: f32, b: Self) -> Self;
    /// [`numerics::fold`](bitnet_core::numerics::fold) of 32 lanes, by addition.
    unsafe fn fold(lanes: [Self; 2]) -> f32;

    unsafe fn no_sums() -> Self::Sums;
    unsafe fn load_sums(x: *const i32) -> Self::Sums;
    unsafe fn store_sums(sums: Self::Sums, out: *mut i32);
    unsafe fn pairs(first: *const i8, second: *const i8) -> Self::Pairs;
    /// [`pairs`](Lanes::pairs) of thirty-two elements.
    #[inline(always)]
    unsafe fn adjacent_pairs(both: *const i8) -> Self::Pairs {
        // SAFETY: twice sixteen elements.
        unsafe { Self::pairs(both, both.add(16)) }
    }
    /// `sums + a.0 * first + a.1 * second`, for `a` the two 16-bit halves of a word, low first.
    unsafe fn add_pairs(sums: Self::Sums, a: i32, pairs: Self::Pairs) -> Self::Sums;
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
