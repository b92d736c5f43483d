//! What machine this is, to be written beside figures that were measured on it.

/// The facts of a machine that decide how fast it computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Name of the processor; its architecture where it does not tell its name.
    pub cpu: String,
    /// Physical cores that this process may use.
    pub cores: usize,
    /// Bytes of memory; `None` where the system does not tell.
    pub memory_bytes: Option<u64>,
    /// Operating system and its version.
    pub os: String,
}

impl Machine {
    /// This machine.
    pub fn this() -> Self {
        let system = sysinfo::System::new().ok().map(|mut system| {
            system.refresh_memory();
            system.refresh_cpu_all();
            system
        });
        let brand = system.as_ref().and_then(|system| Some(system.cpus().first()?.brand().trim()));
        let brand = brand.filter(|brand| !brand.is_empty()).unwrap_or(std::env::consts::ARCH);
        let os = sysinfo::System::long_os_version();
        Machine {
            cpu: brand.to_owned(),
            cores: physical_cores(),
            memory_bytes: system.map(|system| system.total_memory()).filter(|&bytes| bytes > 0),
            os: os.unwrap_or_else(|_| std::env::consts::OS.to_owned()),
        }
    }
}

/// Physical cores that this process may use: what the scheduler and the container allow, and at
/// least 1.
pub fn physical_cores() -> usize {
    // What is allowed is counted in logical CPUs.
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    sysinfo::System::physical_core_count().map_or(allowed, |cores| cores.clamp(1, allowed))
}

/// Bytes of memory that this process occupies, mapped files included as far as they have been read;
/// `None` where the system does not tell.
pub fn resident_bytes() -> Option<u64> {
    let id = sysinfo::get_current_pid().ok()?;
    let mut system = sysinfo::System::new().ok()?;
    let memory = sysinfo::ProcessRefreshKind::nothing().with_memory();
    system.refresh_processes_specifics(sysinfo::ProcessesToUpdate::Some(&[id]), true, memory);
    Some(system.process(id)?.memory()).filter(|&bytes| bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_was_written_is_resident() {
        let before = resident_bytes().unwrap();
        let written = std::hint::black_box(vec![1u8; 64 << 20]);
        let after = resident_bytes().unwrap();
        assert!(after >= before + (48 << 20), "{before} to {after}, {}", written.len());
    }

    #[test]
    fn a_machine_has_a_name_a_core_and_memory() {
        let machine = Machine::this();
        assert!(!machine.cpu.is_empty() && !machine.os.is_empty() && machine.cores >= 1);
        assert!(machine.memory_bytes.is_none_or(|bytes| bytes > 1 << 20));
    }
}
