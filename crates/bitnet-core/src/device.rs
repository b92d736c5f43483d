//! Names of the devices a model can run on.

use std::fmt;
use std::str::FromStr;

/// Where a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// The processor, by SIMD kernels chosen at run time.
    Cpu,
    /// A GPU through Metal, Vulkan or DX12.
    Gpu,
    /// Apple's MLX.
    Mlx,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Device::Cpu => "cpu",
            Device::Gpu => "gpu",
            Device::Mlx => "mlx",
        })
    }
}

/// A device name that is none of `cpu`, `gpu`, `mlx`.
#[derive(Debug, thiserror::Error)]
#[error("unknown device `{0}`: choose cpu, gpu or mlx")]
pub struct UnknownDevice(String);

impl FromStr for Device {
    type Err = UnknownDevice;

    fn from_str(name: &str) -> Result<Self, UnknownDevice> {
        match name {
            "cpu" => Ok(Device::Cpu),
            "gpu" => Ok(Device::Gpu),
            "mlx" => Ok(Device::Mlx),
            other => Err(UnknownDevice(other.to_owned())),
        }
    }
}
