//! Any bytes as a native file. Those that do not begin like one become the header's JSON, so that its
//! length need not be guessed.
#![no_main]

use std::path::Path;

use bitnet_model::formats::native;
use bitnet_model::source::Checkpoint;
use bitnet_model::tokenizer::Special;
use bitnet_model::weights;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let bytes = match native::is_native(data) {
        true => data.to_vec(),
        false => {
            let mut header = native::MAGIC.to_vec();
            header.extend_from_slice(data);
            [&(header.len() as u64).to_le_bytes()[..], &header].concat()
        }
    };
    let path = Path::new("m.bitnet");
    let Ok(Checkpoint { description, tensors }) = native::from_bytes(bytes.into(), path) else {
        return;
    };
    if let Ok(ids) = description.tokenizer.encode("a b<s> é", true, Special::Recognised) {
        let _ = description.tokenizer.decode(&ids, true);
    }
    let _ = weights::tables(path, &description.config, &tensors);
});
