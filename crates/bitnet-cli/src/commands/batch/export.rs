//! The results as a file of some format.

use std::io::{self, BufWriter, Write};
use std::path::Path;

use anyhow::{Result, anyhow};
use serde_json::Value;

use super::input::Fields;
use super::journal::Journal;
use super::parquet_file::ParquetFile;
use crate::args::OutputFormat;
use crate::files;

/// What a result has after the fields of its row.
pub const OUTPUT: &str = "output";
pub const FINISH_REASON: &str = "finish_reason";
pub const TOKENS: &str = "tokens";
pub const ERROR: &str = "error";
pub const RESULT: [&str; 4] = [OUTPUT, FINISH_REASON, TOKENS, ERROR];

/// The format that a file's name tells.
pub fn format_of(path: &Path) -> Option<OutputFormat> {
    match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
        "txt" => Some(OutputFormat::Text),
        "jsonl" | "ndjson" => Some(OutputFormat::Jsonl),
        "csv" => Some(OutputFormat::Csv),
        "md" => Some(OutputFormat::Md),
        "parquet" => Some(OutputFormat::Parquet),
        _ => None,
    }
}

/// Writes all results to a file, which appears when it is whole.
pub fn write(journal: &mut Journal, format: OutputFormat, path: &Path) -> Result<()> {
    let columns = match format {
        OutputFormat::Text | OutputFormat::Jsonl => Vec::new(),
        _ => columns(journal)?,
    };
    let failed = |error: io::Error| files::cannot_be_written(path, &error);
    files::write_whole(path, |file| {
        let mut writer = BufWriter::new(file);
        match format {
            OutputFormat::Text => journal.each(|result| {
                writeln!(writer, "{}", one_line(&cell(&result, OUTPUT))).map_err(failed)
            })?,
            OutputFormat::Jsonl => journal.each(|result| {
                serde_json::to_writer(&mut writer, &result)
                    .map_err(io::Error::from)
                    .and_then(|()| writer.write_all(b"\n"))
                    .map_err(failed)
            })?,
            OutputFormat::Csv => {
                let mut table = csv::Writer::from_writer(&mut writer);
                let failed = |error: csv::Error| failed(error.into());
                table.write_record(&columns).map_err(failed)?;
                journal.each(|result| {
                    let cells = columns.iter().map(|column| cell(&result, column));
                    table.write_record(cells).map_err(failed)
                })?;
                table.flush().map_err(|error| failed(error.into()))?;
            }
            OutputFormat::Md => {
                write_markdown(&mut writer, columns.iter().cloned()).map_err(failed)?;
                let line = vec!["---".to_owned(); columns.len()];
                write_markdown(&mut writer, line.into_iter()).map_err(failed)?;
                journal.each(|result| {
                    let cells = columns.iter().map(|column| cell(&result, column));
                    write_markdown(&mut writer, cells).map_err(failed)
                })?;
            }
            OutputFormat::Parquet => {
                let failed = |error| anyhow!("{}: cannot be written: {error}", path.display());
                let mut table = ParquetFile::new(&mut writer, &columns).map_err(failed)?;
                journal.each(|result| table.push(&result).map_err(failed))?;
                table.finish().map_err(failed)?;
            }
        }
        writer.flush().map_err(failed)
    })
}

/// The names of all fields, in the order in which they first come, and then those of the result.
fn columns(journal: &mut Journal) -> Result<Vec<String>> {
    let mut columns: Vec<String> = Vec::new();
    journal.each(|result| {
        for name in result.keys() {
            if !RESULT.contains(&name.as_str()) && !columns.contains(name) {
                columns.push(name.clone());
            }
        }
        Ok(())
    })?;
    columns.extend(RESULT.map(str::to_owned));
    Ok(columns)
}

/// A field as text: strings as they are, nothing for what is not there, else JSON.
pub fn text(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

fn cell(result: &Fields, column: &str) -> String {
    result.get(column).and_then(text).unwrap_or_default()
}

fn one_line(text: &str) -> String {
    text.replace("\r\n", "\\n").replace(['\n', '\r'], "\\n")
}

fn write_markdown(writer: &mut impl Write, cells: impl Iterator<Item = String>) -> io::Result<()> {
    for cell in cells {
        let cell = cell.replace('\\', "\\\\").replace('|', "\\|");
        let cell = cell.replace("\r\n", "<br>").replace(['\n', '\r'], "<br>");
        write!(writer, "| {} ", cell.trim())?;
    }
    writer.write_all(b"|\n")
}
