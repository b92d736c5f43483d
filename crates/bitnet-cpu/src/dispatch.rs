//! The instruction sets that there are kernels for, and the choice of one at run time.

use std::fmt;
use std::str::FromStr;

use bitnet_core::{Device, Error};

use crate::arch::Kernels;

/// A level of SIMD instructions. The results are the same on every level, bit for bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain code, on any CPU.
    Scalar,
    /// AVX2, FMA and F16C: x86 since 2013.
    Avx2,
    /// AVX2 with AVX-VNNI: Intel since Alder Lake.
    AvxVnni,
    /// AVX-512 F, BW, VL and VNNI: Intel since Ice Lake, AMD since Zen 4.
    Avx512,
    /// NEON, with the dot-product and the matrix-multiplication instructions where the CPU has them:
    /// 64-bit Arm.
    Neon,
}

impl Isa {
    /// All levels; of those for one kind of CPU, the better ones later.
    pub const ALL: [Isa; 5] = [Isa::Scalar, Isa::Avx2, Isa::AvxVnni, Isa::Avx512, Isa::Neon];

    /// Name of the environment variable that forces a level.
    pub const VARIABLE: &str = "BITNET_ISA";

    /// The levels that this CPU has, the best one last.
    pub fn detected() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|&isa| Kernels::for_isa(isa).is_some()).collect()
    }

    /// The level that the environment variable `BITNET_ISA` asks for, if it is set.
    ///
    /// # Errors
    /// If its value is not the name of a level.
    pub fn from_env() -> Result<Option<Isa>, Error> {
        let Some(value) = std::env::var_os(Isa::VARIABLE) else { return Ok(None) };
        let parsed = value.to_string_lossy().parse::<Isa>();
        parsed.map(Some).map_err(|error| unavailable(format!("{}: {error}", Isa::VARIABLE)))
    }

    /// Whether the level, or the best one, takes weights in fewer than two bits each
    /// ([`TileLayout::Triples`](bitnet_core::TileLayout::Triples),
    /// [`RunCodes::Quintuples`](bitnet_core::RunCodes::Quintuples)), from which it decodes faster.
    ///
    /// # Errors
    /// If this CPU does not have the level.
    pub fn takes_compact(isa: Option<Isa>) -> Result<bool, Error> {
        Ok(Isa::kernels(isa)?.take_compact())
    }

    /// Kernels of the level asked for, or of the best one.
    pub(crate) fn kernels(asked: Option<Isa>) -> Result<&'static Kernels, Error> {
        let detected = Isa::detected();
        let isa = asked.unwrap_or(*detected.last().expect("every CPU has the scalar level"));
        Kernels::for_isa(isa).ok_or_else(|| {
            let names: Vec<String> = detected.iter().map(Isa::to_string).collect();
            unavailable(format!("this CPU has no {isa}: choose {}", names.join(" or ")))
        })
    }
}

pub(crate) fn unavailable(reason: String) -> Error {
    Error::DeviceUnavailable { device: Device::Cpu, reason }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512 => "avx512",
            Isa::Neon => "neon",
        })
    }
}

/// A name that no instruction-set level has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownIsa(String);

impl fmt::Display for UnknownIsa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "unknown instruction set `{}`: choose scalar, avx2, avxvnni, avx512 or neon",
            self.0.escape_debug()
        )
    }
}

impl std::error::Error for UnknownIsa {}

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(name: &str) -> Result<Self, UnknownIsa> {
        Isa::ALL
            .into_iter()
            .find(|isa| isa.to_string() == name)
            .ok_or_else(|| UnknownIsa(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse(), Ok(isa));
        }
        let error = "sse9".parse::<Isa>().unwrap_err().to_string();
        assert!(error.contains("`sse9`") && error.contains("avx512"), "{error}");
    }

    #[test]
    fn a_level_of_another_kind_of_cpu_is_refused_with_those_that_are_there() {
        let foreign = if cfg!(target_arch = "aarch64") { Isa::Avx2 } else { Isa::Neon };
        let error = Isa::kernels(Some(foreign)).err().unwrap().to_string();
        assert!(error.contains(&format!("no {foreign}: choose scalar")), "{error}");
    }

    #[test]
    fn the_best_level_is_the_default() {
        let best = Isa::detected().pop().unwrap();
        assert!(Isa::kernels(None).unwrap().name.starts_with(&best.to_string()));
    }
}
