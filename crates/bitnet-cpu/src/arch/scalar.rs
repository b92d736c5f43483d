//! Plain code, for every CPU.
//!
//! The float recipe is made of fused multiply-adds, which are a library call each where the
//! instruction is not part of the target. On x86 CPUs that have the instruction there is a second
//! copy compiled with it, so that this level stays usable on any CPU of the last decade.

use bitnet_quant::packing::blocks::f16_to_f32;

use super::parts::*;

/// The kernels for this CPU.
pub(super) fn kernels() -> &'static Kernels {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("fma") {
        return &fused::KERNELS;
    }
    &KERNELS
}

/// See [`Kernels::ternary_int8`].
fn ternary_int8(tiles: &[Tile], q: &[i8], stride: usize, acc: &mut [[i32; tile::ROWS]]) {
    generic::ternary_int8(tiles, q, stride, acc);
}

instantiate! {
    name: "scalar",
    ternary_int8: ternary_int8,
    sparse: sparse::generic::TABLE,
    upper_bounds: screen::upper_bounds,
    lanes: Sixteen,
}

/// `value` where it is larger, and else `best`.
#[inline(always)]
fn larger(best: f32, value: f32) -> f32 {
    if value > best { value } else { best }
}

/// Sixteen f32 lanes.
#[derive(Clone, Copy)]
struct Sixteen([f32; 16]);

impl Lanes for Sixteen {
    type Sums = [i32; 16];
    type Pairs = [[i32; 16]; 2];
    const ROWS: usize = 1;
    const CHAINS: usize = 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Sixteen([x; 16])
    }

    #[inline(always)]
    unsafe fn load(x: *const f32) -> Self {
        // SAFETY: sixteen elements, by the contract.
        unsafe { Sixteen(x.cast::<[f32; 16]>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn load_f16(x: *const [u8; 2]) -> Self {
        // SAFETY: sixteen elements, by the contract.
        unsafe { Sixteen(x.cast::<[[u8; 2]; 16]>().read().map(f16_to_f32)) }
    }

    #[inline(always)]
    unsafe fn load_bf16(x: *const [u8; 2]) -> Self {
        // SAFETY: sixteen elements, by the contract.
        let x = unsafe { x.cast::<[[u8; 2]; 16]>().read() };
        Sixteen(x.map(|x| f32::from_bits(u32::from(u16::from_le_bytes(x)) << 16)))
    }

    #[inline(always)]
    unsafe fn store(self, out: *mut f32) {
        // SAFETY: room for sixteen elements, by the contract.
        unsafe { out.cast::<[f32; 16]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Sixteen(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Sixteen(std::array::from_fn(|i| self.0[i] * other.0[i]))
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, sum: Self) -> Self {
        Sixteen(std::array::from_fn(|i| self.0[i].mul_add(factor.0[i], sum.0[i])))
    }

    #[inline(always)]
    unsafe fn add_product(self, a: f32, b: Self) -> Self {
        Sixteen(std::array::from_fn(|i| a.mul_add(b.0[i], self.0[i])))
    }

    #[inline(always)]
    unsafe fn fold(lanes: [Self; 2]) -> f32 {
        let lanes = lanes.map(|half| half.0);
        numerics::fold(std::array::from_fn(|i| lanes[i / 16][i % 16]), |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        Sixteen(std::array::from_fn(|i| larger(other.0[i], self.0[i])))
    }

    #[inline(always)]
    unsafe fn fold_max(lanes: [Self; 2]) -> f32 {
        let lanes = lanes.map(|half| half.0);
        numerics::fold(std::array::from_fn(|i| lanes[i / 16][i % 16]), larger)
    }

    #[inline(always)]
    unsafe fn abs(self) -> Self {
        Sixteen(self.0.map(f32::abs))
    }

    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        Sixteen(self.0.map(|x| f32::from_bits((x.to_bits() << 23).wrapping_add(1f32.to_bits()))))
    }

    #[inline(always)]
    unsafe fn zero_where_less(self, x: Self, limit: Self) -> Self {
        Sixteen(std::array::from_fn(|i| if x.0[i] < limit.0[i] { 0.0 } else { self.0[i] }))
    }

    #[inline(always)]
    unsafe fn store_rounded(self, out: *mut i16) {
        let rounded =
            self.0.map(|x| numerics::round_to_i32(if x.is_nan() { 0.0 } else { x }) as i16);
        // SAFETY: room for sixteen elements, by the contract.
        unsafe { out.cast::<[i16; 16]>().write_unaligned(rounded) }
    }

    #[inline(always)]
    unsafe fn no_sums() -> [i32; 16] {
        [0; 16]
    }

    #[inline(always)]
    unsafe fn load_sums(x: *const i32) -> [i32; 16] {
        // SAFETY: sixteen elements, by the contract.
        unsafe { x.cast::<[i32; 16]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store_sums(sums: [i32; 16], out: *mut i32) {
        // SAFETY: room for sixteen elements, by the contract.
        unsafe { out.cast::<[i32; 16]>().write_unaligned(sums) }
    }

    #[inline(always)]
    unsafe fn pairs(x: *const i8) -> Self::Pairs {
        // SAFETY: thirty-two elements, by the contract.
        let pairs = unsafe { x.cast::<[[i8; 2]; 16]>().read() };
        [pairs.map(|pair| i32::from(pair[0])), pairs.map(|pair| i32::from(pair[1]))]
    }

    #[inline(always)]
    unsafe fn add_pairs(sums: [i32; 16], a: i32, pairs: Self::Pairs) -> [i32; 16] {
        let (low, high) = (i32::from(a as i16), a >> 16);
        std::array::from_fn(|i| sums[i] + low * pairs[0][i] + high * pairs[1][i])
    }

    #[inline(always)]
    unsafe fn join_sums(a: [i32; 16], b: [i32; 16]) -> [i32; 16] {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    unsafe fn from_sums(sums: [i32; 16]) -> Self {
        Sixteen(sums.map(|sum| sum as f32))
    }
}

#[cfg(target_arch = "x86_64")]
mod fused {
    use bitnet_core::Screen;
    use bitnet_core::screen::ROWS;
    use bitnet_quant::screen::Input;

    use super::super::parts::*;
    use super::Sixteen;

    /// See [`Kernels::ternary_int8`].
    #[target_feature(enable = "fma")]
    fn ternary_int8(tiles: &[Tile], q: &[i8], stride: usize, acc: &mut [[i32; tile::ROWS]]) {
        generic::ternary_int8(tiles, q, stride, acc);
    }

    /// See [`Kernels::upper_bounds`].
    #[target_feature(enable = "fma")]
    fn upper_bounds(screen: &Screen, first: usize, inputs: &[Input], out: &mut [[f32; ROWS]]) {
        screen::upper_bounds(screen, first, inputs, out);
    }

    instantiate! {
        name: "scalar",
        ternary_int8: ternary_int8,
        sparse: sparse::generic::TABLE,
        upper_bounds: upper_bounds,
        lanes: Sixteen,
        #[target_feature(enable = "fma")]
    }
}
