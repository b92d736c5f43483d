//! What an instruction set brings to attention.

/// Sixteen f32 lanes, and the integer products behind int8.
///
/// Implementations are compiled with the instructions that they need, and taken into the kernels,
/// which have them all, by inlining.
///
/// # Safety of the functions
/// The CPU has the instructions of the implementation, and every pointer is to sixteen elements.
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
    unsafe fn store(self, out: *mut f32);
    unsafe fn mul(self, other: Self) -> Self;
    /// `self + a * b`, fused.
    unsafe fn add_product(self, a: f32, b: Self) -> Self;

    unsafe fn no_sums() -> Self::Sums;
    unsafe fn load_sums(x: *const i32) -> Self::Sums;
    unsafe fn store_sums(sums: Self::Sums, out: *mut i32);
    unsafe fn pairs(first: *const i8, second: *const i8) -> Self::Pairs;
    /// `sums + a.0 * first + a.1 * second`, for `a` the two 16-bit halves of a word, low first.
    unsafe fn add_pairs(sums: Self::Sums, a: i32, pairs: Self::Pairs) -> Self::Sums;
    /// Rounded to the nearest f32.
    unsafe fn from_sums(sums: Self::Sums) -> Self;
}
