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

fn decode_f16(half: &[[u8; 2]], out: &mut [f32]) {
    for (value, &half) in out.iter_mut().zip(half) {
        *value = f16_to_f32(half);
    }
}

/// See [`Kernels::ternary_int8`].
fn ternary_int8(tiles: &[Tile], q: &[i8], stride: usize, acc: &mut [[i32; tile::ROWS]]) {
    generic::ternary_int8(tiles, q, stride, acc);
}

instantiate! {
    name: "scalar",
    ternary_int8: ternary_int8,
    screen_sums: bitnet_quant::screen::sums,
    decode_f16: decode_f16,
}

#[cfg(target_arch = "x86_64")]
mod fused {
    use super::super::parts::*;
    use super::decode_f16;

    /// See [`Kernels::ternary_int8`].
    #[target_feature(enable = "fma")]
    fn ternary_int8(tiles: &[Tile], q: &[i8], stride: usize, acc: &mut [[i32; tile::ROWS]]) {
        generic::ternary_int8(tiles, q, stride, acc);
    }

    instantiate! {
        name: "scalar",
        ternary_int8: ternary_int8,
        screen_sums: bitnet_quant::screen::sums,
        decode_f16: decode_f16,
        #[target_feature(enable = "fma")]
    }
}
