//! Every packing against the reference data, against plain index formulas, and back and forth.

use bitnet_core::{DType, Error, Tensor, TernaryMatrix, WeightScale};
use bitnet_quant::packing::i2_s::{self, I2sLayout};
use bitnet_quant::packing::{blocks, decode_ternary, encode_ternary, hf};
use proptest::prelude::*;
use safetensors::SafeTensors;

const BLOCK_TYPES: [DType; 4] = [DType::Tq1_0, DType::Tq2_0, DType::Q2_0, DType::Q2_0Wide];

/// Calls `check` with the reference data, where it is there.
fn with_golden(path: &str, check: impl FnOnce(&SafeTensors<'_>)) {
    if let Some(path) = bitnet_testing::golden(path) {
        let file = std::fs::read(path).unwrap();
        check(&SafeTensors::deserialize(&file).unwrap());
    }
}

fn bytes(golden: &SafeTensors<'_>, name: &str) -> Vec<u8> {
    golden.tensor(name).unwrap().data().to_vec()
}

fn shape(golden: &SafeTensors<'_>, name: &str) -> Vec<usize> {
    golden.tensor(name).unwrap().shape().to_vec()
}

fn f32s(golden: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let (words, _) = golden.tensor(name).unwrap().data().as_chunks();
    words.iter().map(|&word| f32::from_le_bytes(word)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn packed(dtype: DType, shape: &[usize], bytes: Vec<u8>) -> Tensor {
    Tensor::new(dtype, shape.to_vec(), bytes.into()).unwrap()
}

fn weights(matrix: &TernaryMatrix) -> Vec<i8> {
    let row = |row| (0..matrix.cols()).map(move |col| matrix.weight(row, col));
    (0..matrix.rows()).flat_map(row).collect()
}

/// Weight times scale, element by element.
fn values(matrix: &TernaryMatrix) -> Vec<f32> {
    let factor = |row: usize, col: usize| match matrix.scale() {
        WeightScale::Multiply(scale) => *scale,
        WeightScale::Divide(scale) => 1.0 / scale,
        WeightScale::Rows(scales) => scales[row],
        WeightScale::Groups { len, values } => values[row * (matrix.cols() / len) + col / len],
    };
    weights(matrix)
        .iter()
        .enumerate()
        .map(|(i, &w)| f32::from(w) * factor(i / matrix.cols(), i % matrix.cols()))
        .collect()
}

fn matrix(rows: usize, cols: usize, scale: WeightScale, codes: &[u8]) -> TernaryMatrix {
    TernaryMatrix::from_rows(rows, cols, scale, |row, out| {
        out.copy_from_slice(&codes[row * cols..(row + 1) * cols]);
    })
    .unwrap()
}

/// Rows, columns (a multiple of `unit`) and codes.
fn any_codes(unit: usize) -> impl Strategy<Value = (usize, usize, Vec<u8>)> {
    (1..10usize, 1..(300 / unit).max(3)).prop_flat_map(move |(rows, units)| {
        let cols = units * unit;
        (Just(rows), Just(cols), proptest::collection::vec(0..3u8, rows * cols))
    })
}

#[test]
fn transformers_bytes_are_read_and_written_exactly() {
    with_golden("quant/quant_edges.safetensors", |golden| {
        for i in 0..8 {
            let (name, ternary) = (format!("weight.{i}.packed"), format!("weight.{i}.ternary"));
            let tensor = packed(DType::U8, &shape(golden, &name), bytes(golden, &name));
            let rows = shape(golden, &ternary)[0];
            let matrix = hf::decode(&tensor, rows, WeightScale::Divide(2.0)).unwrap();
            let expected: Vec<i8> = bytes(golden, &ternary).iter().map(|&b| b as i8).collect();
            assert_eq!(weights(&matrix), expected, "{name}");
            assert_eq!(hf::encode(&matrix), bytes(golden, &name), "{name}");
        }
    });
}

#[test]
fn every_transformers_byte_has_the_reference_weights_or_is_refused() {
    with_golden("quant/quant_edges.safetensors", |golden| {
        let unpacked = bytes(golden, "packing.unpacked");
        let packed_bytes = bytes(golden, "packing.bytes");
        assert_eq!(unpacked.len(), 4 * packed_bytes.len());
        for (i, &byte) in packed_bytes.iter().enumerate() {
            let expected: Vec<i8> =
                unpacked[i..].iter().step_by(packed_bytes.len()).map(|&b| b as i8).collect();
            let tensor = packed(DType::U8, &[1, 1], vec![byte]);
            match hf::decode(&tensor, 4, WeightScale::Multiply(1.0)) {
                Ok(matrix) => assert_eq!(weights(&matrix), expected, "{byte:#010b}"),
                // transformers itself takes the fourth code for a weight of 2.
                Err(Error::IllegalCode { row, .. }) => assert_eq!(expected[row], 2),
                Err(other) => panic!("{other}"),
            }
        }
    });
}

#[test]
fn ggml_ternary_blocks_are_read_and_written_exactly() {
    with_golden("gguf/blocks.safetensors", |golden| {
        for i in 0..8 {
            for dtype in [DType::Tq1_0, DType::Tq2_0] {
                let name = format!("{i}.{dtype}");
                let dequantized = f32s(golden, &format!("{name}.dequantized"));
                let shape = shape(golden, &format!("{name}.dequantized"));
                let packed_bytes = bytes(golden, &format!("{name}.bytes"));
                let tensor = packed(dtype, &shape, packed_bytes.clone());

                let mut row_values = vec![0.0; shape[1]];
                for (row, expected) in dequantized.chunks_exact(shape[1]).enumerate() {
                    blocks::decode_row(dtype, tensor.row(row), &mut row_values);
                    assert_eq!(bits(&row_values), bits(expected), "{name}, row {row}");
                }
                let matrix = decode_ternary(&tensor, I2sLayout::default()).unwrap();
                assert_eq!(values(&matrix), dequantized, "{name}");
                assert_eq!(encode_ternary(&matrix, dtype).unwrap(), packed_bytes, "{name}");
            }
        }
    });
}

#[test]
fn ggml_blocks_of_random_bytes_have_the_reference_values() {
    with_golden("gguf/blocks.safetensors", |golden| {
        for dtype in [DType::Tq1_0, DType::Tq2_0] {
            let expected = f32s(golden, &format!("random.{dtype}.dequantized"));
            let packed_bytes = bytes(golden, &format!("random.{dtype}.bytes"));
            let mut decoded = vec![0.0; expected.len()];
            blocks::decode_row(dtype, &packed_bytes, &mut decoded);
            assert_eq!(bits(&decoded), bits(&expected), "{dtype}");
        }
    });
}

#[test]
fn scales_of_blocks_merge_to_one_per_matrix_or_row_where_they_agree() {
    with_golden("gguf/blocks.safetensors", |golden| {
        let scale = |i: usize| {
            let name = format!("{i}.TQ2_0.bytes");
            let tensor = packed(DType::Tq2_0, &[6, 768], bytes(golden, &name));
            decode_ternary(&tensor, I2sLayout::default()).unwrap().scale().clone()
        };
        assert_eq!(scale(0), WeightScale::Multiply(1.0));
        assert!(matches!(scale(4), WeightScale::Rows(values) if values.len() == 6));
        // One block of zeros with scale 0, all others with one scale.
        assert!(matches!(scale(5), WeightScale::Multiply(d) if d > 0.0));
    });
}

#[test]
fn i2_s_bytes_of_the_published_converter_are_read_and_written_exactly() {
    with_golden("gguf/blocks.safetensors", |golden| {
        for i in [0, 1, 2, 3, 6] {
            let input = format!("{i}.input");
            let packed_bytes = bytes(golden, &format!("{i}.I2_S.bytes"));
            let tensor = packed(DType::I2S, &shape(golden, &input), packed_bytes.clone());
            let matrix = decode_ternary(&tensor, I2sLayout::X86).unwrap();
            assert_eq!(values(&matrix), f32s(golden, &input), "{input}");
            assert_eq!(encode_ternary(&matrix, DType::I2S).unwrap(), packed_bytes, "{input}");
        }
    });
}

#[test]
fn rows_of_plain_floats_decode_from_any_alignment() {
    let numbers = [0.0f32, -1.5, 65504.0, 6.0e-8, -0.25, 3.0, 1.0e-3];
    let mut out = [0.0; 7];
    let mut decode = |dtype, encoded: Vec<u8>| {
        let shifted = [&[0xAA], &encoded[..]].concat();
        blocks::decode_row(dtype, &encoded, &mut out);
        let aligned = out;
        blocks::decode_row(dtype, &shifted[1..], &mut out);
        assert_eq!(aligned, out);
        out
    };
    let f32_bytes = numbers.iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(decode(DType::F32, f32_bytes), numbers);
    let bf16 = numbers.map(half::bf16::from_f32);
    let bf16_bytes = bf16.iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(decode(DType::BF16, bf16_bytes), bf16.map(half::bf16::to_f32));
    let f16 = numbers.map(half::f16::from_f32);
    let f16_bytes = f16.iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(decode(DType::F16, f16_bytes), f16.map(half::f16::to_f32));
    let thirds = numbers.map(|v| f64::from(v) / 3.0);
    let f64_bytes = thirds.iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(decode(DType::F64, f64_bytes), thirds.map(|v| v as f32));
}

#[test]
fn ggml_embedding_blocks_have_the_values_of_the_gguf_package() {
    // Two blocks of a fixed byte pattern, dequantised by the Python package gguf 0.19.0: values 1,
    // len / 3 and len - 2, and the sum of (i + 1) * value[i], which is exact in f64.
    // scripts/check_gguf_blocks.py compares many more.
    for (dtype, scales_at, expected, weighted_sum) in [
        (
            DType::Q8_0,
            &[0][..],
            [-6.88592529296875, -4.17034912109375, -7.66180419921875],
            -2994.892578125,
        ),
        (
            DType::Q4K,
            &[0, 2],
            [21.66961669921875, 29.95751953125, 46.69281005859375],
            4569302.001953125,
        ),
        (
            DType::Q6K,
            &[208],
            [-118.22454833984375, -6.11004638671875, 55.76629638671875],
            363113.65576171875,
        ),
    ] {
        let size = dtype.block_bytes();
        let mut file: Vec<u8> =
            (0..2 * size).map(|i| ((i * i * 7 + i * 37 + 11) % 256) as u8).collect();
        for block in file.chunks_exact_mut(size) {
            for (at, high) in scales_at.iter().zip([0x2e, 0xb3]) {
                block[*at..*at + 2].copy_from_slice(&[0x35, high]);
            }
        }
        let mut values = vec![0.0; 2 * dtype.block_len()];
        blocks::decode_row(dtype, &file, &mut values);
        let len = values.len();
        let picked = [values[1], values[len / 3], values[len - 2]].map(f64::from);
        assert_eq!(picked, expected, "{dtype}");
        let sum: f64 = (1..).zip(&values).map(|(i, &value)| f64::from(i) * f64::from(value)).sum();
        assert_eq!(sum, weighted_sum, "{dtype}");
    }
}

#[test]
fn code_three_is_refused_with_its_place_in_every_two_bit_packing() {
    // One code 3 at row 5, column 130 of [8, 256] zeros; the bytes it lies in by hand.
    let refused = |result: Result<TernaryMatrix, Error>| match result {
        Err(Error::IllegalCode { code: 3, row: 5, column: 130 }) => {}
        other => panic!("{other:?}"),
    };
    let mut bytes = vec![0x55u8; 2 * 256];
    bytes[256 + 130] |= 3 << 4;
    refused(hf::decode(&packed(DType::U8, &[2, 256], bytes), 8, WeightScale::Multiply(1.0)));

    let element = 5 * 256 + 130;
    for (layout, byte, shift) in [
        (I2sLayout::X86, element / 128 * 32 + 2, 6),
        (I2sLayout::Arm, element / 64 * 16 + 2, 6),
        (I2sLayout::X86Rows, 256 + 130, 4),
    ] {
        let mut bytes = vec![0x55u8; 8 * 256 / 4 + 32];
        bytes[8 * 256 / 4..].fill(0);
        bytes[byte] |= 3 << shift;
        refused(decode_ternary(&packed(DType::I2S, &[8, 256], bytes), layout));
    }
    for (dtype, byte, shift) in [
        (DType::Tq2_0, 5 * 66 + 32 + 2, 0),
        (DType::Q2_0, (5 * 4 + 2) * 18 + 2, 4),
        (DType::Q2_0Wide, (5 * 2 + 1) * 34 + 2, 4),
    ] {
        let zeros = matrix(8, 256, WeightScale::Multiply(1.0), &[1; 8 * 256]);
        let mut bytes = encode_ternary(&zeros, dtype).unwrap();
        bytes[byte] |= 3 << shift;
        refused(decode_ternary(&packed(dtype, &[8, 256], bytes), I2sLayout::X86));
    }
}

#[test]
fn scales_that_are_not_finite_are_refused_even_on_zero_blocks() {
    for (dtype, scale_at) in
        [(DType::Tq1_0, 52), (DType::Tq2_0, 64), (DType::Q2_0, 0), (DType::Q2_0Wide, 0)]
    {
        let zeros = matrix(1, 256, WeightScale::Multiply(1.0), &[1; 256]);
        let mut bytes = encode_ternary(&zeros, dtype).unwrap();
        bytes[scale_at..scale_at + 2].copy_from_slice(&half::f16::NAN.to_le_bytes());
        let result = decode_ternary(&packed(dtype, &[1, 256], bytes), I2sLayout::X86);
        assert!(matches!(result, Err(Error::WeightScale { .. })), "{dtype}");
    }
    let mut bytes = vec![0x55; 64 + 32];
    bytes[64..68].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let result = decode_ternary(&packed(DType::I2S, &[1, 256], bytes), I2sLayout::X86);
    assert!(matches!(result, Err(Error::WeightScale { .. })));
}

#[test]
fn shapes_that_do_not_fill_their_blocks_are_refused_with_the_reason() {
    let reason = |result: Result<TernaryMatrix, Error>| result.unwrap_err().to_string();
    let i2s = |shape: &[usize]| {
        let elements: usize = shape.iter().product();
        packed(DType::I2S, shape, vec![0x55; elements / 4 + 32])
    };
    let text = reason(decode_ternary(&i2s(&[3, 64]), I2sLayout::X86));
    assert!(text.contains("[3, 64]") && text.contains("last block of 128"), "{text}");
    let text = reason(decode_ternary(&i2s(&[3, 32]), I2sLayout::Arm));
    assert!(text.contains("last block of 64"), "{text}");
    let text = reason(decode_ternary(&i2s(&[6, 128]), I2sLayout::X86Rows));
    assert!(text.contains("6 rows"), "{text}");

    let bytes = packed(DType::U8, &[2, 3], vec![0; 6]);
    let text = reason(hf::decode(&bytes, 9, WeightScale::Multiply(1.0)));
    assert!(text.contains("9 rows of ternary weights pack into 3"), "{text}");
    assert!(hf::decode(&bytes, 0, WeightScale::Multiply(1.0)).is_err());

    // Nothing to read, and 2^40 rows of it.
    let empty = packed(DType::Tq2_0, &[1 << 40, 0], Vec::new());
    assert!(reason(decode_ternary(&empty, I2sLayout::X86)).contains("no elements"));
    let empty = packed(DType::U8, &[1 << 40, 0], Vec::new());
    assert!(hf::decode(&empty, 1 << 42, WeightScale::Multiply(1.0)).is_err());
}

#[test]
fn types_without_ternary_weights_are_refused_by_name() {
    let floats = Tensor::from_f32(vec![1, 4], &[0.0; 4]);
    let text = decode_ternary(&floats, I2sLayout::X86).unwrap_err().to_string();
    assert!(text.contains("F32") && text.contains("ternary"), "{text}");
    assert!(hf::decode(&floats, 4, WeightScale::Multiply(1.0)).is_err());
    assert!(i2_s::decode(&floats, I2sLayout::X86).is_err());
    let matrix = matrix(1, 4, WeightScale::Multiply(1.0), &[1; 4]);
    assert!(encode_ternary(&matrix, DType::F16).is_err());
}

#[test]
fn matrices_that_a_format_cannot_hold_are_refused() {
    let scaled = |scale| matrix(2, 256, scale, &[2; 512]);
    let refused = |scale, dtype| encode_ternary(&scaled(scale), dtype).unwrap_err().to_string();
    assert!(refused(WeightScale::Rows(vec![1.0, 2.0]), DType::I2S).contains("one scale"));
    for out_of_range in [1e-9, 1e6] {
        let text = refused(WeightScale::Multiply(out_of_range), DType::Tq2_0);
        assert!(text.contains("range of f16"), "{text}");
    }
    let groups = WeightScale::Groups { len: 128, values: vec![1.0, 2.0, 3.0, 3.0] };
    assert!(refused(groups.clone(), DType::Tq1_0).contains("within a block of 256"));
    assert!(encode_ternary(&scaled(groups), DType::Q2_0).is_ok());
    let narrow = matrix(1, 64, WeightScale::Multiply(1.0), &[1; 64]);
    assert!(encode_ternary(&narrow, DType::Tq2_0).is_err());
    assert!(encode_ternary(&narrow, DType::I2S).is_err());
}

#[test]
fn a_dividing_scale_is_stored_as_its_reciprocal() {
    let matrix = matrix(1, 256, WeightScale::Divide(4.0), &[2; 256]);
    for dtype in BLOCK_TYPES.into_iter().chain([DType::I2S]) {
        let tensor = packed(dtype, &[1, 256], encode_ternary(&matrix, dtype).unwrap());
        let decoded = decode_ternary(&tensor, I2sLayout::X86).unwrap();
        assert_eq!(decoded.scale(), &WeightScale::Multiply(0.25), "{dtype}");
    }
}

proptest! {
    #[test]
    fn transformers_packing_comes_back_for_any_number_of_rows((rows, cols, codes) in any_codes(1)) {
        let matrix = matrix(rows, cols, WeightScale::Multiply(0.5), &codes);
        let packed_rows = rows.div_ceil(4);
        let mut expected = vec![0u8; packed_rows * cols];
        for (i, code) in codes.iter().enumerate() {
            let (row, col) = (i / cols, i % cols);
            expected[row % packed_rows * cols + col] |= code << (2 * (row / packed_rows));
        }
        prop_assert_eq!(hf::encode(&matrix), &expected[..]);
        let tensor = packed(DType::U8, &[packed_rows, cols], expected);
        let decoded = hf::decode(&tensor, rows, WeightScale::Multiply(0.5)).unwrap();
        prop_assert_eq!(decoded, matrix);
    }

    #[test]
    fn i2_s_blocks_run_across_the_ends_of_rows((rows, quarters, codes) in any_codes(16)) {
        // Columns in whole bytes but seldom in whole blocks; rows enough to fill the last one.
        let cols = quarters / 4;
        let rows = rows * 32;
        let codes: Vec<u8> = codes.iter().copied().cycle().take(rows * cols).collect();
        let matrix = matrix(rows, cols, WeightScale::Multiply(0.5), &codes);
        let pack = |quarter: usize| {
            let mut bytes = vec![0u8; codes.len() / 4 + 32];
            for (i, code) in codes.iter().enumerate() {
                let (block, j) = (i / (4 * quarter), i % (4 * quarter));
                bytes[block * quarter + j % quarter] |= code << (6 - 2 * (j / quarter));
            }
            bytes[codes.len() / 4..][..4].copy_from_slice(&0.5f32.to_le_bytes());
            bytes
        };
        let arm = packed(DType::I2S, &[rows, cols], pack(16));
        prop_assert_eq!(&i2_s::decode(&arm, I2sLayout::Arm).unwrap(), &matrix);
        prop_assert_eq!(i2_s::encode(&matrix).unwrap(), pack(32));
        let x86 = packed(DType::I2S, &[rows, cols], pack(32));
        prop_assert_eq!(&i2_s::decode(&x86, I2sLayout::X86).unwrap(), &matrix);
    }

    #[test]
    fn i2_s_of_four_rows_to_a_byte_is_read((rows, cols, codes) in any_codes(1)) {
        let rows = 4 * rows;
        let codes: Vec<u8> = codes.iter().copied().cycle().take(rows * cols).collect();
        let mut bytes = vec![0u8; codes.len() / 4 + 32];
        for (i, code) in codes.iter().enumerate() {
            let (row, col) = (i / cols, i % cols);
            bytes[row / 4 * cols + col] |= code << (6 - 2 * (row % 4));
        }
        let tensor = packed(DType::I2S, &[rows, cols], bytes);
        let decoded = i2_s::decode(&tensor, I2sLayout::X86Rows).unwrap();
        prop_assert_eq!(decoded, matrix(rows, cols, WeightScale::Multiply(0.0), &codes));
    }

    #[test]
    fn block_formats_come_back_with_scales_per_block_row_or_matrix(
        (rows, cols, codes) in any_codes(256),
        dtype in proptest::sample::select(&BLOCK_TYPES),
        seed in 1..1000usize,
    ) {
        let len = dtype.block_len();
        // Sixteenths are exact in f16. Different in every block.
        let scales: Vec<f32> =
            (0..rows * cols / len).map(|i| (i + seed) as f32 / 16.0).collect();
        let mut codes = codes;
        for block in codes.chunks_exact_mut(len) {
            block[seed % len] = 2; // no block without a nonzero weight
        }
        let came_back = |scale| {
            let original = matrix(rows, cols, scale, &codes);
            let bytes = encode_ternary(&original, dtype).unwrap();
            let decoded = decode_ternary(&packed(dtype, &[rows, cols], bytes), I2sLayout::X86);
            (decoded.unwrap(), original)
        };
        let (decoded, original) = came_back(WeightScale::Multiply(scales[0]));
        prop_assert_eq!(decoded, original);
        let (decoded, original) = came_back(WeightScale::Rows(scales[..rows].to_vec()));
        prop_assert_eq!(values(&decoded), values(&original));
        prop_assert!(rows == 1 || decoded == original);
        let (decoded, original) = came_back(WeightScale::Groups { len, values: scales });
        prop_assert_eq!(values(&decoded), values(&original));
        prop_assert!(cols == len || decoded == original);
    }

    #[test]
    fn q2_0_bytes_follow_the_formula_of_ggml(
        (rows, cols, codes) in any_codes(128),
        dtype in proptest::sample::select(&[DType::Q2_0, DType::Q2_0Wide]),
    ) {
        let (len, size) = (dtype.block_len(), dtype.block_bytes());
        let mut expected = vec![0u8; rows * cols / len * size];
        for (i, code) in codes.iter().enumerate() {
            let (block, j) = (i / len, i % len);
            let start = block * size;
            expected[start + 2 + j / 4] |= code << (2 * (j % 4));
            if *code != 1 {
                expected[start..start + 2].copy_from_slice(&half::f16::ONE.to_le_bytes());
            }
        }
        let matrix = matrix(rows, cols, WeightScale::Multiply(1.0), &codes);
        prop_assert_eq!(encode_ternary(&matrix, dtype).unwrap(), &expected[..]);
        let tensor = packed(dtype, &[rows, cols], expected);
        prop_assert_eq!(weights(&decode_ternary(&tensor, I2sLayout::X86).unwrap()), weights(&matrix));
    }

    #[test]
    fn rows_of_ternary_blocks_have_the_values_of_the_matrix(
        (rows, cols, codes) in any_codes(256),
        dtype in proptest::sample::select(&BLOCK_TYPES),
    ) {
        let matrix = matrix(rows, cols, WeightScale::Multiply(0.375), &codes);
        let tensor = packed(dtype, &[rows, cols], encode_ternary(&matrix, dtype).unwrap());
        let mut row_values = vec![0.0; cols];
        for (row, expected) in values(&matrix).chunks_exact(cols).enumerate() {
            blocks::decode_row(dtype, tensor.row(row), &mut row_values);
            prop_assert_eq!(&row_values[..], expected);
        }
    }
}
