//! Decodes rows of one of ggml's types from standard input and writes them to standard output, so
//! that other implementations can be compared with ours: see `scripts/check_gguf_blocks.py`.
//!
//! `decode_blocks TYPE COLS` writes little-endian f32 values; `decode_blocks TYPE COLS again`
//! reads the rows as a ternary matrix and writes that matrix in the same type.

use std::error::Error;
use std::io::{Read, Write};

use bitnet_core::{DType, Tensor};
use bitnet_quant::packing::{blocks, decode_ternary, encode_ternary, i2_s::I2sLayout};

const TYPES: [DType; 8] = [
    DType::F16,
    DType::BF16,
    DType::Q8_0,
    DType::Q4K,
    DType::Q6K,
    DType::Tq1_0,
    DType::Tq2_0,
    DType::Q2_0,
];

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (name, cols, again) = match &args[..] {
        [name, cols] => (name, cols, false),
        [name, cols, again] if again == "again" => (name, cols, true),
        _ => return Err("usage: decode_blocks TYPE COLS [again]".into()),
    };
    let dtype = *TYPES
        .iter()
        .find(|dtype| dtype.to_string() == *name)
        .ok_or_else(|| format!("unknown type `{name}`"))?;
    let cols: usize = cols.parse()?;
    let row_bytes = dtype.byte_len(&[cols])?;
    let mut input = Vec::new();
    std::io::stdin().read_to_end(&mut input)?;
    let tensor = Tensor::new(dtype, vec![input.len() / row_bytes, cols], input.into())?;

    let mut output = Vec::new();
    if again {
        output = encode_ternary(&decode_ternary(&tensor, I2sLayout::default())?, dtype)?;
    } else {
        let mut values = vec![0.0; cols];
        for row in 0..tensor.rows() {
            blocks::decode_row(dtype, tensor.row(row), &mut values);
            output.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
    }
    std::io::stdout().write_all(&output)?;
    Ok(())
}
