//! Element types of stored tensors: plain numbers, and the block formats of GGUF files.

use std::fmt;

/// How the elements of a stored tensor are encoded. All are little-endian.
///
/// Block formats hold [`block_len`](DType::block_len) consecutive elements of a row in
/// [`block_bytes`](DType::block_bytes) bytes; their layouts are described where they are decoded
/// (`bitnet_quant::packing`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the plain number types say what they are
pub enum DType {
    F64,
    F32,
    F16,
    BF16,
    U8,
    I8,
    I32,
    I64,
    /// ggml: 32 values, f16 scale and 32 i8.
    Q8_0,
    /// ggml K-quant: 256 values in 144 bytes.
    Q4K,
    /// ggml K-quant: 256 values in 210 bytes.
    Q6K,
    /// ggml ternary, base 3: 256 values in 54 bytes.
    Tq1_0,
    /// ggml ternary, 2 bits: 256 values in 66 bytes.
    Tq2_0,
    /// ggml 2 bits: 64 values in 18 bytes.
    Q2_0,
    /// Prism's wide variant of `Q2_0` under the same file id: 128 values in 34 bytes.
    Q2_0Wide,
    /// bitnet.cpp ternary: 2 bits over the whole flat tensor, then one f32 scale in 32 bytes.
    I2S,
}

impl DType {
    /// Elements per block: 1 for plain numbers.
    pub fn block_len(self) -> usize {
        match self {
            DType::Q8_0 => 32,
            DType::Q4K | DType::Q6K | DType::Tq1_0 | DType::Tq2_0 => 256,
            DType::Q2_0 => 64,
            DType::Q2_0Wide => 128,
            _ => 1,
        }
    }

    /// Bytes per block. For [`DType::I2S`] this is meaningless, its size is a rule over the whole
    /// tensor: use [`byte_len`](DType::byte_len).
    pub fn block_bytes(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::U8 | DType::I8 | DType::I2S => 1,
            DType::Q8_0 => 34,
            DType::Q4K => 144,
            DType::Q6K => 210,
            DType::Tq1_0 => 54,
            DType::Tq2_0 => 66,
            DType::Q2_0 => 18,
            DType::Q2_0Wide => 34,
        }
    }

    /// Bytes of a tensor of `shape` (outermost extent first), or why it cannot exist.
    pub fn byte_len(self, shape: &[usize]) -> Result<usize, String> {
        let overflow = || "its size overflows".to_owned();
        let elements = shape
            .iter()
            .try_fold(1usize, |n, &extent| n.checked_mul(extent))
            .ok_or_else(overflow)?;
        if self == DType::I2S {
            if !elements.is_multiple_of(4) {
                return Err(format!("{elements} elements do not fill whole bytes"));
            }
            return (elements / 4).checked_add(32).ok_or_else(overflow);
        }
        let innermost = shape.last().copied().unwrap_or(1);
        if !innermost.is_multiple_of(self.block_len()) {
            return Err(format!(
                "rows of {innermost} do not hold whole blocks of {}",
                self.block_len()
            ));
        }
        (elements / self.block_len()).checked_mul(self.block_bytes()).ok_or_else(overflow)
    }

    /// Whether the elements are floating-point numbers stored one by one.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F64 | DType::F32 | DType::F16 | DType::BF16)
    }

    /// Whether the type holds ternary weights with their scales.
    pub fn is_ternary(self) -> bool {
        matches!(self, DType::Tq1_0 | DType::Tq2_0 | DType::Q2_0 | DType::Q2_0Wide | DType::I2S)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F64 => "F64",
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::U8 => "U8",
            DType::I8 => "I8",
            DType::I32 => "I32",
            DType::I64 => "I64",
            DType::Q8_0 => "Q8_0",
            DType::Q4K => "Q4_K",
            DType::Q6K => "Q6_K",
            DType::Tq1_0 => "TQ1_0",
            DType::Tq2_0 => "TQ2_0",
            DType::Q2_0 => "Q2_0",
            DType::Q2_0Wide => "Q2_0 (128 wide)",
            DType::I2S => "I2_S",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_lengths_follow_the_block_rules() {
        assert_eq!(DType::BF16.byte_len(&[3, 5]), Ok(30));
        assert_eq!(DType::Tq2_0.byte_len(&[2, 512]), Ok(4 * 66));
        assert_eq!(DType::I2S.byte_len(&[640, 2560]), Ok(640 * 2560 / 4 + 32));
        assert!(DType::Q6K.byte_len(&[256, 128]).is_err());
        assert!(DType::F32.byte_len(&[usize::MAX, 2]).is_err());
    }
}
