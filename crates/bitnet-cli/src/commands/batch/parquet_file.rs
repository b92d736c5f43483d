//! The results as a Parquet file: a column of text for each field, and a column of numbers for
//! [`TOKENS`].

use std::io::Write;
use std::sync::Arc;

use parquet::basic::{Compression, ConvertedType, LogicalType, Repetition, Type as PhysicalType};
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::errors::Result;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;

use super::export::{TOKENS, text};
use super::input::Fields;

/// A row group is written when it has so many rows or bytes of text: that much is in memory.
const ROWS: usize = 16_384;
const BYTES: usize = 32 << 20;

pub struct ParquetFile<'a, W: Write + Send> {
    writer: SerializedFileWriter<W>,
    columns: &'a [String],
    /// The cells that are not written yet, column by column.
    waiting: Vec<Cells>,
    bytes: usize,
}

enum Cells {
    Text(Vec<Option<String>>),
    Numbers(Vec<Option<i64>>),
}

impl Cells {
    fn len(&self) -> usize {
        match self {
            Cells::Text(cells) => cells.len(),
            Cells::Numbers(cells) => cells.len(),
        }
    }
}

impl<'a, W: Write + Send> ParquetFile<'a, W> {
    pub fn new(writer: W, columns: &'a [String]) -> Result<Self> {
        let mut fields = Vec::new();
        for name in columns {
            let field = match name == TOKENS {
                true => Type::primitive_type_builder(name, PhysicalType::INT64),
                false => Type::primitive_type_builder(name, PhysicalType::BYTE_ARRAY)
                    .with_converted_type(ConvertedType::UTF8)
                    .with_logical_type(Some(LogicalType::String)),
            };
            fields.push(Arc::new(field.with_repetition(Repetition::OPTIONAL).build()?));
        }
        let schema = Arc::new(Type::group_type_builder("rows").with_fields(fields).build()?);
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
        let writer = SerializedFileWriter::new(writer, schema, Arc::new(properties))?;
        let mut file = ParquetFile { writer, columns, waiting: Vec::new(), bytes: 0 };
        file.empty();
        Ok(file)
    }

    fn empty(&mut self) {
        self.bytes = 0;
        let cells = |name: &String| match name == TOKENS {
            true => Cells::Numbers(Vec::new()),
            false => Cells::Text(Vec::new()),
        };
        self.waiting = self.columns.iter().map(cells).collect();
    }

    pub fn push(&mut self, result: &Fields) -> Result<()> {
        for (name, cells) in self.columns.iter().zip(&mut self.waiting) {
            let value = result.get(name);
            match cells {
                Cells::Text(cells) => {
                    let cell = value.and_then(text);
                    self.bytes += cell.as_ref().map_or(0, String::len);
                    cells.push(cell);
                }
                Cells::Numbers(cells) => cells.push(value.and_then(serde_json::Value::as_i64)),
            }
        }
        match self.bytes >= BYTES || self.waiting[0].len() >= ROWS {
            true => self.write_group(),
            false => Ok(()),
        }
    }

    fn write_group(&mut self) -> Result<()> {
        let mut group = self.writer.next_row_group()?;
        for cells in &self.waiting {
            let mut column = group.next_column()?.expect("there is one for each name");
            match cells {
                Cells::Text(cells) => {
                    let values: Vec<ByteArray> =
                        cells.iter().flatten().map(|text| text.as_str().into()).collect();
                    let there: Vec<i16> = cells.iter().map(|cell| cell.is_some().into()).collect();
                    column.typed::<ByteArrayType>().write_batch(&values, Some(&there), None)?;
                }
                Cells::Numbers(cells) => {
                    let values: Vec<i64> = cells.iter().flatten().copied().collect();
                    let there: Vec<i16> = cells.iter().map(|cell| cell.is_some().into()).collect();
                    column.typed::<Int64Type>().write_batch(&values, Some(&there), None)?;
                }
            }
            column.close()?;
        }
        group.close()?;
        self.empty();
        Ok(())
    }

    pub fn finish(mut self) -> Result<()> {
        if self.waiting[0].len() > 0 {
            self.write_group()?;
        }
        self.writer.close().map(drop)
    }
}
