//! `bitnet devices`: where models can run here.

use std::collections::BTreeMap;

use anyhow::Result;
use bitnet_core::Device;
use bitnet_core::backend::Backend;
use bitnet_cpu::{CpuBackend, CpuOptions, Isa};
use bitnet_inference::device_reason;
use serde::Serialize;

use crate::args::DevicesArgs;
use crate::output;

#[derive(Serialize)]
struct DeviceInfo {
    device: String,
    available: bool,
    /// What it is, or why it is not there.
    description: String,
    /// What the processor has, the best last.
    instruction_sets: Vec<String>,
}

pub fn run(args: DevicesArgs) -> Result<()> {
    let devices: Vec<DeviceInfo> =
        [Device::Cpu, Device::Gpu, Device::Mlx].into_iter().map(describe).collect::<Result<_>>()?;
    if args.json {
        return Ok(output::json(&BTreeMap::from([("devices", devices)]))?);
    }
    let row = |device: &DeviceInfo| {
        let mut description = device.description.clone();
        if !device.instruction_sets.is_empty() {
            description = format!("{description}; it has {}", device.instruction_sets.join(", "));
        }
        let available = if device.available { "yes" } else { "no" };
        [device.device.clone(), available.to_owned(), description]
    };
    Ok(output::lines(&output::table(&devices.iter().map(row).collect::<Vec<_>>(), [false; 3]))?)
}

fn describe(device: Device) -> Result<DeviceInfo> {
    let name = device.to_string();
    if let Some(description) = device_reason(device) {
        let instruction_sets = Vec::new();
        return Ok(DeviceInfo { device: name, available: false, description, instruction_sets });
    }
    let cpu = CpuBackend::new(CpuOptions {
        threads: None,
        isa: Isa::from_env()?,
        ..CpuOptions::default()
    })?;
    Ok(DeviceInfo {
        device: name,
        available: true,
        description: cpu.name(),
        instruction_sets: Isa::detected().iter().map(Isa::to_string).collect(),
    })
}
