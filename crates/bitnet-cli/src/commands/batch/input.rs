//! The rows of a text, of JSON lines or of a CSV table, one by one.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::rc::Rc;

use anyhow::{Result, anyhow, bail};
use csv::ByteRecord;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::args::InputFormat;

/// What a line of text is called.
pub const PROMPT: &str = "prompt";

/// Far more than any context holds.
const MAX_ROW_BYTES: u64 = 64 << 20;

/// The fields of a row, in their order.
pub type Fields = Map<String, Value>;

/// A row as it stands in the file.
pub struct Row {
    /// Its fields, as many as could be read.
    pub fields: Fields,
    /// Why it cannot be used.
    pub problem: Option<String>,
}

/// The format that a file's name tells.
pub fn format_of(path: &Path) -> Option<InputFormat> {
    match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
        "txt" => Some(InputFormat::Text),
        "jsonl" | "ndjson" => Some(InputFormat::Jsonl),
        "csv" => Some(InputFormat::Csv),
        _ => None,
    }
}

/// The rows of a file, in its order. An error ends them.
pub struct Rows {
    name: String,
    source: Source,
    /// Lines that were read.
    line: u64,
    digest: Sha256Of,
}

enum Source {
    Lines { reader: BufReader<Measured>, json: bool },
    Table { reader: csv::Reader<Measured>, columns: Vec<String>, left: Rc<Cell<u64>> },
}

impl Rows {
    pub fn open(path: &Path, format: InputFormat) -> Result<Self> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|error| anyhow!("{name}: cannot be read: {error}"))?;
        if file.metadata().is_ok_and(|metadata| metadata.is_dir()) {
            bail!("{name}: is a folder: give one file");
        }
        let digest = Sha256Of::default();
        let left = Rc::new(Cell::new(u64::MAX));
        let file = Measured { file, digest: digest.clone(), left: left.clone() };
        let source = match format {
            InputFormat::Csv => {
                let mut reader =
                    csv::ReaderBuilder::new().flexible(true).has_headers(false).from_reader(file);
                let columns = header(&name, &mut reader)?;
                Source::Table { reader, columns, left }
            }
            InputFormat::Text | InputFormat::Jsonl => {
                let mut reader = BufReader::new(file);
                skip_byte_order_mark(&mut reader)
                    .map_err(|error| anyhow!("{name}: cannot be read: {error}"))?;
                Source::Lines { reader, json: format == InputFormat::Jsonl }
            }
        };
        Ok(Rows { name, source, line: 0, digest })
    }

    /// The names that every row's fields have; `None` where each row has its own.
    pub fn columns(&self) -> Option<Vec<String>> {
        match &self.source {
            Source::Table { columns, .. } => Some(columns.clone()),
            Source::Lines { json: false, .. } => Some(vec![PROMPT.to_owned()]),
            Source::Lines { json: true, .. } => None,
        }
    }

    /// Reads to the end. Returns how many rows there are, and the digest of the file.
    pub fn count(mut self) -> Result<(u64, String)> {
        let mut rows = 0;
        for row in self.by_ref() {
            row?;
            rows += 1;
        }
        Ok((rows, self.digest.hex()))
    }

    fn read(&mut self) -> Result<Option<Row>> {
        let Rows { name, source, line, .. } = self;
        match source {
            Source::Table { reader, columns, left } => {
                left.set(MAX_ROW_BYTES);
                let mut record = ByteRecord::new();
                match reader.read_byte_record(&mut record) {
                    Ok(true) => Ok(Some(row_of_table(columns, &record))),
                    Ok(false) => Ok(None),
                    Err(error) => bail!("{name}: cannot be read: {error}"),
                }
            }
            Source::Lines { reader, json } => loop {
                *line += 1;
                let bytes = match read_line(reader) {
                    Ok(Line::Whole(bytes)) => bytes,
                    Ok(Line::TooLong) => {
                        let limit = MAX_ROW_BYTES >> 20;
                        let problem = format!("line {line}: is longer than {limit} MiB");
                        return Ok(Some(Row { fields: Fields::new(), problem: Some(problem) }));
                    }
                    Ok(Line::End) => return Ok(None),
                    Err(error) => bail!("{name}: cannot be read: {error}"),
                };
                if *json && bytes.trim_ascii().is_empty() {
                    continue;
                }
                return Ok(Some(match json {
                    true => row_of_json(*line, &bytes),
                    false => row_of_text(*line, &bytes),
                }));
            },
        }
    }
}

impl Iterator for Rows {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

/// The names in the first row of a table.
fn header(name: &str, reader: &mut csv::Reader<Measured>) -> Result<Vec<String>> {
    let mut record = ByteRecord::new();
    let there = reader
        .read_byte_record(&mut record)
        .map_err(|error| anyhow!("{name}: cannot be read: {error}"))?;
    if !there {
        bail!("{name}: is empty: its first line must name the columns");
    }
    let mut columns: Vec<String> = Vec::new();
    for cell in &record {
        let Ok(column) = std::str::from_utf8(cell) else {
            bail!("{name}: line 1: is not UTF-8 text: save the table as UTF-8");
        };
        if columns.iter().any(|other| other == column) {
            bail!("{name}: line 1: has two columns `{column}`: give each a name of its own");
        }
        columns.push(column.to_owned());
    }
    Ok(columns)
}

fn row_of_table(columns: &[String], record: &ByteRecord) -> Row {
    let mut problem = None;
    let line = record.position().map_or(0, csv::Position::line);
    if record.len() != columns.len() {
        let (cells, columns) = (record.len(), columns.len());
        problem = Some(format!("line {line}: has {cells} fields where the header has {columns}"));
    }
    let mut fields = Fields::new();
    for (column, cell) in columns.iter().zip(record) {
        if std::str::from_utf8(cell).is_err() {
            problem.get_or_insert_with(|| format!("line {line}: `{column}` is not UTF-8 text"));
        }
        fields.insert(column.clone(), String::from_utf8_lossy(cell).into());
    }
    Row { fields, problem }
}

fn row_of_text(line: u64, bytes: &[u8]) -> Row {
    let problem =
        std::str::from_utf8(bytes).err().map(|_| format!("line {line}: is not UTF-8 text"));
    let text = String::from_utf8_lossy(bytes);
    Row { fields: Fields::from_iter([(PROMPT.to_owned(), text.into())]), problem }
}

fn row_of_json(line: u64, bytes: &[u8]) -> Row {
    let problem = match serde_json::from_slice(bytes) {
        Ok(Value::Object(fields)) => return Row { fields, problem: None },
        Ok(_) => format!("line {line}: is no JSON object"),
        Err(error) => {
            // Its line is that of a text of one line.
            let reason = error.to_string();
            let reason = reason.split(" at line ").next().unwrap_or(&reason);
            format!("line {line}: is not JSON: {reason} at column {}", error.column())
        }
    };
    Row { fields: Fields::new(), problem: Some(problem) }
}

fn skip_byte_order_mark(reader: &mut BufReader<Measured>) -> io::Result<()> {
    if reader.fill_buf()?.starts_with(b"\xef\xbb\xbf") {
        reader.consume(3);
    }
    Ok(())
}

enum Line {
    /// Without its end.
    Whole(Vec<u8>),
    TooLong,
    /// There is none any more.
    End,
}

fn read_line(reader: &mut BufReader<Measured>) -> io::Result<Line> {
    let mut bytes = Vec::new();
    if reader.by_ref().take(MAX_ROW_BYTES).read_until(b'\n', &mut bytes)? == 0 {
        return Ok(Line::End);
    }
    if bytes.len() as u64 == MAX_ROW_BYTES && !bytes.ends_with(b"\n") {
        reader.skip_until(b'\n')?;
        return Ok(Line::TooLong);
    }
    for end in [b'\n', b'\r'] {
        bytes.pop_if(|last| *last == end);
    }
    Ok(Line::Whole(bytes))
}

#[derive(Clone, Default)]
struct Sha256Of(Rc<RefCell<Sha256>>);

impl Sha256Of {
    fn hex(&self) -> String {
        let digest = self.0.borrow().clone().finalize();
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A file whose digest is taken as it is read, and that ends with an error when a row has no end: a
/// quote that is never closed must not take all of the memory.
struct Measured {
    file: File,
    digest: Sha256Of,
    /// Bytes that the row may still have.
    left: Rc<Cell<u64>>,
}

impl Read for Measured {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.digest.0.borrow_mut().update(&buffer[..count]);
        match self.left.get().checked_sub(count as u64) {
            Some(left) => self.left.set(left),
            None => {
                let limit = MAX_ROW_BYTES >> 20;
                return Err(io::Error::other(format!(
                    "a row has more than {limit} MiB: is a quote not closed?"
                )));
            }
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(format: InputFormat, text: &[u8]) -> Vec<(String, Option<String>)> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let rows = Rows::open(file.path(), format).unwrap();
        rows.map(|row| row.unwrap())
            .map(|row| (Value::Object(row.fields).to_string(), row.problem))
            .collect()
    }

    #[test]
    fn a_line_of_text_is_a_row_even_if_it_is_empty() {
        let found = rows(InputFormat::Text, b"\xef\xbb\xbfone\r\n\ntwo \xff\nthree");
        let expected = [
            (r#"{"prompt":"one"}"#, None),
            (r#"{"prompt":""}"#, None),
            ("{\"prompt\":\"two \u{fffd}\"}", Some("line 3: is not UTF-8 text")),
            (r#"{"prompt":"three"}"#, None),
        ];
        assert_eq!(found, expected.map(|(row, why)| (row.to_owned(), why.map(str::to_owned))));
    }

    #[test]
    fn a_bad_line_of_json_spoils_its_row_only() {
        let found = rows(InputFormat::Jsonl, b"{\"b\":1,\"a\":[2]}\n\n{\"b\":\n7\n{}\n");
        let expected = [
            (r#"{"b":1,"a":[2]}"#, None),
            ("{}", Some("line 3: is not JSON: EOF while parsing a value at column 5")),
            ("{}", Some("line 4: is no JSON object")),
            ("{}", None),
        ];
        assert_eq!(found, expected.map(|(row, why)| (row.to_owned(), why.map(str::to_owned))));
    }

    #[test]
    fn uneven_rows_of_a_table_keep_what_has_a_name() {
        let table = b"a,b\n1,\"x\ny\"\n2\n3,4,5\n";
        let expected = [
            (r#"{"a":"1","b":"x\ny"}"#, None),
            (r#"{"a":"2"}"#, Some("line 4: has 1 fields where the header has 2")),
            (r#"{"a":"3","b":"4"}"#, Some("line 5: has 3 fields where the header has 2")),
        ];
        let found = rows(InputFormat::Csv, table);
        assert_eq!(found, expected.map(|(row, why)| (row.to_owned(), why.map(str::to_owned))));
    }
}
