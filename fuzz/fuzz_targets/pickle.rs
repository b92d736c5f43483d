//! Any bytes as a `pytorch_model.bin`: as the archive if they begin like one, else as the pickle of
//! an otherwise good archive, so that the pickle's length may change.
#![no_main]

use std::io::{Cursor, Write};
use std::path::Path;

use bitnet_model::formats::{Tensors, pickle};
use libfuzzer_sys::fuzz_target;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

fn archive(pickle: &[u8]) -> Vec<u8> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, data) in [("m/data.pkl", pickle), ("m/data/0", &[7; 16]), ("m/data/1", &[])] {
        writer.start_file(name, options).expect("the name is new");
        writer.write_all(data).expect("memory can be written");
    }
    writer.finish().expect("memory can be written").into_inner()
}

fuzz_target!(|data: &[u8]| {
    let bytes = if data.starts_with(b"PK") { data.to_vec() } else { archive(data) };
    let mut tensors = Tensors::default();
    if pickle::from_bytes(bytes.into(), Path::new("m.bin"), &mut tensors).is_ok() {
        for name in tensors.names() {
            let _ = tensors.get(name);
        }
    }
});
