//! A stored tensor: type, shape and bytes, which may be owned, mapped from a file or built in.

use bytes::Bytes;

use crate::dtype::DType;
use crate::error::Error;

/// A tensor as it is stored. Cloning shares the bytes.
#[derive(Debug, Clone)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    data: Bytes,
}

impl Tensor {
    /// Checks that `data` has exactly the bytes that `dtype` and `shape` (outermost extent first)
    /// say.
    pub fn new(dtype: DType, shape: Vec<usize>, data: Bytes) -> Result<Self, Error> {
        match dtype.byte_len(&shape) {
            Err(reason) => Err(Error::TensorShape { dtype, shape, reason }),
            Ok(expected) if expected != data.len() => {
                Err(Error::TensorSize { dtype, shape, expected, found: data.len() })
            }
            Ok(_) => Ok(Tensor { dtype, shape, data }),
        }
    }

    /// An f32 tensor that owns its values.
    ///
    /// # Panics
    /// If `values` does not fill `shape`.
    pub fn from_f32(shape: Vec<usize>, values: &[f32]) -> Self {
        let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Tensor::new(DType::F32, shape, data.into()).expect("values fill the shape")
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The encoded elements, little-endian, rows one after another.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Extent of the innermost dimension: elements per row.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of rows: the product of all extents but the innermost.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, outer)| outer.iter().product())
    }

    /// The bytes of one row.
    ///
    /// # Panics
    /// If `row` is out of range, or for [`DType::I2S`], whose rows are not byte ranges.
    pub fn row(&self, row: usize) -> &[u8] {
        assert_ne!(self.dtype, DType::I2S, "I2_S rows are not byte ranges");
        let bytes = self.cols() / self.dtype.block_len() * self.dtype.block_bytes();
        &self.data[row * bytes..(row + 1) * bytes]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_shorter_than_its_shape_is_refused() {
        let short = Tensor::new(DType::F32, vec![2, 3], Bytes::from_static(&[0; 20]));
        assert!(matches!(short, Err(Error::TensorSize { expected: 24, found: 20, .. })));
    }

    #[test]
    fn rows_are_the_byte_ranges_of_the_innermost_dimension() {
        let t = Tensor::from_f32(vec![2, 2], &[1.0, 2.0, 3.0, 4.0]);
        assert_eq!(t.row(1), [3f32.to_le_bytes(), 4f32.to_le_bytes()].concat());
        assert_eq!((t.rows(), t.cols(), t.len()), (2, 2, 4));
    }
}
