//! Any bytes as the index of a sharded checkpoint. No shard may lie outside the index's folder.
#![no_main]

use std::path::Path;

use bitnet_model::formats::index::ShardIndex;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(index) = ShardIndex::from_bytes(data, Path::new("m.json")) {
        let folder = Path::new("folder");
        for (shard, _) in index.shards() {
            assert_eq!(folder.join(shard).parent(), Some(folder));
        }
    }
});
