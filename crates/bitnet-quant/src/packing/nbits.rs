//! Operands of ONNX Runtime's `MatMulNBits` (its `ContribOperators.md`): of each row, blocks of codes
//! of 2, 4 or 8 bits, the first in the low bits. A weight is the code less a zero point, which is in
//! the middle of the codes if it is not stored.

use bitnet_core::TernaryMatrix;

use super::unpack_row;

/// How codes lie in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// Bits per code: 2, 4 or 8.
    pub bits: usize,
    /// Codes per block, a multiple of 8.
    pub len: usize,
    /// Columns of the matrix per block. What is left of a block is zero weights.
    pub cols: usize,
}

impl Blocks {
    /// Blocks in a row of so many columns.
    pub fn per_row(&self, cols: usize) -> usize {
        cols.div_ceil(self.cols)
    }

    /// Bytes of a block.
    pub fn bytes(&self) -> usize {
        self.len * self.bits / 8
    }

    /// The code of the weight zero.
    pub fn zero(&self) -> u8 {
        1 << (self.bits - 1)
    }

    /// One of the codes in the bytes of a block, or of several.
    pub fn code(&self, bytes: &[u8], index: usize) -> u8 {
        let per_byte = 8 / self.bits;
        let mask = u8::MAX >> (8 - self.bits);
        bytes[index / per_byte] >> (self.bits * (index % per_byte)) & mask
    }

    /// The codes of a matrix, `[rows, blocks, bytes]`, without zero points. Its scale is the caller's to
    /// store.
    pub fn encode(&self, matrix: &TernaryMatrix) -> Vec<u8> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let per_byte = 8 / self.bits;
        // Codes are the weight + 1 here, and the weight + zero there.
        let offset = self.zero() - 1;
        let mut codes = vec![0; cols];
        let mut block = vec![self.zero(); self.len];
        let mut packed = Vec::with_capacity(rows * self.per_row(cols) * self.bytes());
        for row in 0..rows {
            unpack_row(matrix, row, &mut codes);
            for codes in codes.chunks(self.cols) {
                let (own, rest) = block.split_at_mut(codes.len());
                own.iter_mut().zip(codes).for_each(|(to, code)| *to = code + offset);
                rest.fill(self.zero());
                let pack = |codes: &[u8]| {
                    let bits = codes.iter().enumerate();
                    bits.fold(0, |byte, (index, code)| byte | code << (self.bits * index))
                };
                packed.extend(block.chunks(per_byte).map(pack));
            }
        }
        packed
    }
}

#[cfg(test)]
mod tests {
    use bitnet_core::WeightScale;

    use super::*;

    #[test]
    fn codes_come_back_and_the_rest_of_a_block_is_zero_weights() {
        let matrix = TernaryMatrix::from_rows(3, 37, WeightScale::Multiply(1.0), |row, codes| {
            codes.iter_mut().enumerate().for_each(|(col, code)| *code = ((row + col) % 3) as u8);
        })
        .unwrap();
        for (bits, len, cols) in [(2, 16, 15), (2, 16, 16), (4, 16, 13), (8, 8, 8)] {
            let blocks = Blocks { bits, len, cols };
            let bytes = blocks.encode(&matrix);
            let row_bytes = blocks.per_row(37) * blocks.bytes();
            assert_eq!(bytes.len(), 3 * row_bytes);
            for (row, bytes) in bytes.chunks(row_bytes).enumerate() {
                for (block, bytes) in bytes.chunks(blocks.bytes()).enumerate() {
                    for index in 0..len {
                        let col = block * cols + index;
                        let weight = match index < cols && col < 37 {
                            true => matrix.weight(row, col),
                            false => 0,
                        };
                        let code = blocks.code(bytes, index) as i16 - i16::from(blocks.zero());
                        assert_eq!(code, i16::from(weight), "{blocks:?} {row} {col}");
                    }
                }
            }
        }
    }

    #[test]
    fn four_codes_of_two_bits_lie_from_the_low_bits_up() {
        // The order in `MatMulNBits`' own description: -1, 0, +1, -1.
        let matrix = TernaryMatrix::from_rows(1, 8, WeightScale::Multiply(1.0), |_, codes| {
            codes.copy_from_slice(&[0, 1, 2, 0, 1, 1, 1, 1]);
        })
        .unwrap();
        let blocks = Blocks { bits: 2, len: 8, cols: 8 };
        assert_eq!(blocks.encode(&matrix), [0b01_11_10_01, 0b10_10_10_10]);
    }
}
