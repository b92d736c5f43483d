//! What a KV store takes of the machine's memory. In a program of its own, because it measures the
//! whole process, and only where the system tells what that is.

#[cfg(target_os = "linux")]
#[test]
fn blocks_that_were_never_written_take_no_memory() {
    use bitnet_core::backend::{Backend, KvLayout, KvType};
    use bitnet_cpu::{CpuBackend, CpuOptions};

    /// Bytes of this process that are in memory.
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        1024 * line.trim().trim_end_matches(" kB").parse::<usize>().unwrap()
    }

    let options = CpuOptions { threads: Some(1), ..CpuOptions::default() };
    let backend = CpuBackend::new(options).unwrap();
    for kv_type in [KvType::F32, KvType::F16, KvType::Int8] {
        // The shape of a small model, with so many blocks that they take at least 250 MB.
        let layout = KvLayout { layers: 4, kv_heads: 2, head_size: 64, block_tokens: 16, kv_type };
        let blocks = 250_000_000usize.div_ceil(layout.block_bytes());
        let before = resident();
        let mut kv = backend.kv_allocate(layout, blocks).unwrap();
        let grown = resident().saturating_sub(before);
        assert!(grown < 5_000_000, "{kv_type:?}: {grown} bytes before anything is written");
        let used = blocks as u32 / 10;
        let ones = vec![1; layout.block_bytes()];
        for block in 0..used {
            backend.kv_import(&mut kv, &[block], &ones).unwrap();
        }
        let (grown, share) =
            (resident().saturating_sub(before), used as usize * layout.block_bytes());
        assert!(grown > share / 2, "{kv_type:?}: {grown} bytes after {share} were written");
        assert!(grown < 2 * share + 5_000_000, "{kv_type:?}: {grown} bytes for {share} written");
    }
}
