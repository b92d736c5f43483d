//! `bitnet devices`: what a model can run on here.

use anyhow::Result;
use bitnet_core::Device;
use bitnet_core::budget::{available_memory, human_bytes};
use bitnet_cpu::Isa;
use bitnet_inference::device_reason;
use serde_json::json;

use crate::args::DevicesArgs;
use crate::output;

pub fn run(args: DevicesArgs) -> Result<()> {
    let levels: Vec<String> = Isa::detected().iter().map(Isa::to_string).collect();
    let memory = available_memory();
    if args.json {
        let mut devices = vec![json!({
            "device": Device::Cpu.to_string(),
            "available": true,
            "instruction_sets": levels,
            "available_memory": memory,
        })];
        for device in [Device::Gpu, Device::Mlx] {
            devices.push(json!({
                "device": device.to_string(),
                "available": false,
                "reason": device_reason(device),
            }));
        }
        output::json(&json!({ "devices": devices }))?;
        return Ok(());
    }
    let memory = memory.map_or("memory unknown".to_owned(), |bytes| {
        format!("{} of memory available", human_bytes(bytes))
    });
    let cpu = format!("{}; {memory}", levels.join(", "));
    let mut rows = vec![[Device::Cpu.to_string(), "available".to_owned(), cpu]];
    for device in [Device::Gpu, Device::Mlx] {
        let reason = device_reason(device).unwrap_or_default();
        rows.push([device.to_string(), "not available".to_owned(), reason]);
    }
    output::lines(&output::table(&rows, [false, false, false]))?;
    Ok(())
}
