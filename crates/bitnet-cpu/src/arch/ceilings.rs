//! Loops that run at the limit of a CPU's units, to hold the kernels against.
//!
//! They are written in assembly where a compiler would see that nothing depends on them. Each
//! touches registers alone.

use std::arch::asm;

/// A loop of multiply-adds on int8 numbers.
#[derive(Clone, Copy)]
pub(crate) struct MultiplyAdd {
    /// The instructions it is made of.
    pub(crate) name: &'static str,
    /// Multiply-adds of one turn.
    macs: u64,
    run: unsafe fn(u64),
}

impl MultiplyAdd {
    /// The loops that this CPU can run. The first is the one that shares refer to.
    pub(crate) fn all() -> Vec<MultiplyAdd> {
        let mut loops = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") {
                loops.push(MultiplyAdd {
                    name: "vpmaddubsw + vpaddw",
                    macs: 12 * 32,
                    run: x86::maddubs,
                });
            }
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
                loops.push(MultiplyAdd {
                    name: "vpdpbusd, 512 bits",
                    macs: 12 * 64,
                    run: x86::dpbusd,
                });
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            if std::arch::is_aarch64_feature_detected!("dotprod") {
                loops.push(MultiplyAdd { name: "sdot", macs: 16 * 16, run: arm::sdot });
            }
            loops.push(MultiplyAdd { name: "smlal + smlal2", macs: 16 * 8, run: arm::smlal });
        }
        if loops.is_empty() {
            loops.push(MultiplyAdd { name: "plain code", macs: 16, run: plain });
        }
        loops
    }

    /// Runs the loop for some turns and returns the multiply-adds that this took.
    pub(crate) fn run(self, turns: u64) -> u64 {
        // SAFETY: `all` lists a loop only where the CPU has its instructions.
        unsafe { (self.run)(turns) };
        turns * self.macs
    }
}

/// Sixteen 32-bit multiply-adds of one turn, for CPUs without a loop of their own.
fn plain(turns: u64) {
    let mut sums = [0i32; 16];
    for turn in 0..turns {
        let factor = std::hint::black_box(turn as i32);
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = sum.wrapping_add(factor.wrapping_mul(i as i32 + 3));
        }
    }
    std::hint::black_box(sums);
}

/// Additions that wait for each other, one per clock cycle on every CPU with a hand-written loop:
/// tells the clock. Returns how many there were; `None` where there is no such loop.
pub(crate) fn dependent_adds(turns: u64) -> Option<u64> {
    let _ = turns;
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    {
        let mut left = turns.max(1);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: instructions on registers alone. `add` of a register, because Zen 4 and later
        // rename chains of additions of small constants away.
        unsafe {
            asm!(
                "2:",
                "add {sum}, {one}", "add {sum}, {one}", "add {sum}, {one}", "add {sum}, {one}",
                "add {sum}, {one}", "add {sum}, {one}", "add {sum}, {one}", "add {sum}, {one}",
                "add {sum}, {one}", "add {sum}, {one}", "add {sum}, {one}", "add {sum}, {one}",
                "add {sum}, {one}", "add {sum}, {one}", "add {sum}, {one}", "add {sum}, {one}",
                "sub {left}, 1",
                "jnz 2b",
                sum = inout(reg) 0u64 => _, one = in(reg) 1u64, left = inout(reg) left,
                options(nomem, nostack),
            );
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: instructions on registers alone.
        unsafe {
            asm!(
                "2:",
                "add {sum}, {sum}, {one}", "add {sum}, {sum}, {one}",
                "add {sum}, {sum}, {one}", "add {sum}, {sum}, {one}",
                "add {sum}, {sum}, {one}", "add {sum}, {sum}, {one}",
                "add {sum}, {sum}, {one}", "add {sum}, {sum}, {one}",
                "add {sum}, {sum}, {one}", "add {sum}, {sum}, {one}",
                "add {sum}, {sum}, {one}", "add {sum}, {sum}, {one}",
                "add {sum}, {sum}, {one}", "add {sum}, {sum}, {one}",
                "add {sum}, {sum}, {one}", "add {sum}, {sum}, {one}",
                "subs {left}, {left}, #1",
                "b.ne 2b",
                sum = inout(reg) 0u64 => _, one = in(reg) 1u64, left = inout(reg) left,
                options(nomem, nostack),
            );
        }
        let _ = left;
        return Some(turns.max(1) * 16);
    }
    #[allow(unreachable_code)] // on the architectures above
    None
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::asm;

    /// Twelve times vpmaddubsw, whose products go nowhere, beside vpaddw on six sums: the rate that
    /// is left when nothing waits for anything. A kernel has to add its products, so it can at most
    /// come near.
    ///
    /// # Safety
    /// The CPU has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn maddubs(turns: u64) {
        // SAFETY: instructions on registers alone, which the enclosing function's features include.
        unsafe {
            asm!(
                "vpxor ymm0, ymm0, ymm0",
                "vpxor ymm1, ymm1, ymm1",
                "2:",
                "vpmaddubsw ymm2, ymm0, ymm1", "vpaddw ymm8, ymm8, ymm0",
                "vpmaddubsw ymm3, ymm0, ymm1", "vpaddw ymm9, ymm9, ymm0",
                "vpmaddubsw ymm4, ymm0, ymm1", "vpaddw ymm10, ymm10, ymm0",
                "vpmaddubsw ymm5, ymm0, ymm1", "vpaddw ymm11, ymm11, ymm0",
                "vpmaddubsw ymm6, ymm0, ymm1", "vpaddw ymm12, ymm12, ymm0",
                "vpmaddubsw ymm7, ymm0, ymm1", "vpaddw ymm13, ymm13, ymm0",
                "vpmaddubsw ymm2, ymm0, ymm1", "vpaddw ymm8, ymm8, ymm0",
                "vpmaddubsw ymm3, ymm0, ymm1", "vpaddw ymm9, ymm9, ymm0",
                "vpmaddubsw ymm4, ymm0, ymm1", "vpaddw ymm10, ymm10, ymm0",
                "vpmaddubsw ymm5, ymm0, ymm1", "vpaddw ymm11, ymm11, ymm0",
                "vpmaddubsw ymm6, ymm0, ymm1", "vpaddw ymm12, ymm12, ymm0",
                "vpmaddubsw ymm7, ymm0, ymm1", "vpaddw ymm13, ymm13, ymm0",
                "sub {turns}, 1",
                "jnz 2b",
                turns = inout(reg) turns.max(1) => _,
                out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _,
                out("ymm5") _, out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _,
                out("ymm10") _, out("ymm11") _, out("ymm12") _, out("ymm13") _,
                options(nomem, nostack),
            );
        }
    }

    /// Twelve sums of vpdpbusd: enough that none waits for the one before.
    ///
    /// # Safety
    /// The CPU has AVX-512 F and VNNI.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) unsafe fn dpbusd(turns: u64) {
        // SAFETY: instructions on registers alone, which the enclosing function's features include.
        unsafe {
            asm!(
                "vpxord zmm0, zmm0, zmm0",
                "vpxord zmm1, zmm1, zmm1",
                "2:",
                "vpdpbusd zmm2, zmm0, zmm1", "vpdpbusd zmm3, zmm0, zmm1",
                "vpdpbusd zmm4, zmm0, zmm1", "vpdpbusd zmm5, zmm0, zmm1",
                "vpdpbusd zmm6, zmm0, zmm1", "vpdpbusd zmm7, zmm0, zmm1",
                "vpdpbusd zmm8, zmm0, zmm1", "vpdpbusd zmm9, zmm0, zmm1",
                "vpdpbusd zmm10, zmm0, zmm1", "vpdpbusd zmm11, zmm0, zmm1",
                "vpdpbusd zmm12, zmm0, zmm1", "vpdpbusd zmm13, zmm0, zmm1",
                "sub {turns}, 1",
                "jnz 2b",
                turns = inout(reg) turns.max(1) => _,
                out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _,
                out("zmm5") _, out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _,
                out("zmm10") _, out("zmm11") _, out("zmm12") _, out("zmm13") _,
                options(nomem, nostack),
            );
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::asm;

    /// Sixteen instructions on sixteen sums.
    macro_rules! sixteen {
        ($turns:ident, $even:literal, $odd:literal) => {
            asm!(
                "movi v0.16b, #0",
                "movi v1.16b, #0",
                "2:",
                concat!($even, " v16", $odd), concat!($even, " v17", $odd),
                concat!($even, " v18", $odd), concat!($even, " v19", $odd),
                concat!($even, " v20", $odd), concat!($even, " v21", $odd),
                concat!($even, " v22", $odd), concat!($even, " v23", $odd),
                concat!($even, " v24", $odd), concat!($even, " v25", $odd),
                concat!($even, " v26", $odd), concat!($even, " v27", $odd),
                concat!($even, " v28", $odd), concat!($even, " v29", $odd),
                concat!($even, " v30", $odd), concat!($even, " v31", $odd),
                "subs {turns}, {turns}, #1",
                "b.ne 2b",
                turns = inout(reg) $turns.max(1) => _,
                out("v0") _, out("v1") _, out("v16") _, out("v17") _, out("v18") _, out("v19") _,
                out("v20") _, out("v21") _, out("v22") _, out("v23") _, out("v24") _,
                out("v25") _, out("v26") _, out("v27") _, out("v28") _, out("v29") _,
                out("v30") _, out("v31") _,
                options(nomem, nostack),
            )
        };
    }

    /// Sixteen times sdot.
    ///
    /// # Safety
    /// The CPU has the dot-product instructions.
    #[target_feature(enable = "neon,dotprod")]
    pub(super) unsafe fn sdot(turns: u64) {
        // SAFETY: instructions on registers alone, which the enclosing function's features include.
        unsafe { sixteen!(turns, "sdot", ".4s, v0.16b, v1.16b") }
    }

    /// Sixteen times smlal; smlal2, which takes the upper halves, costs the same.
    ///
    /// # Safety
    /// Every 64-bit Arm CPU can run it.
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn smlal(turns: u64) {
        // SAFETY: instructions on registers alone.
        unsafe { sixteen!(turns, "smlal", ".8h, v0.8b, v1.8b") }
    }
}
