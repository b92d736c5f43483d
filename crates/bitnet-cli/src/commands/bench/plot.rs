//! The results of `bitnet bench` as a chart: a bar for each test, prefill and decode by themselves,
//! because their speeds are ten times apart.

use std::fmt::Write as _;

use bitnet_inference::bench::Kind;

use super::report::{Report, Row};
use crate::output::number;

/// Pixels. Text of 13 pixels has at most 8 or so per character.
const WIDTH: f64 = 760.0;
const MARGIN: f64 = 28.0;
const ROW: f64 = 34.0;
const BAR: f64 = 16.0;
const CHARACTER: f64 = 8.6;
/// Room for the figure at the end of the longest bar.
const FIGURE: f64 = 64.0;

const INK: &str = "#1f2937";
const PALE: &str = "#6b7280";
const GRID: &str = "#e5e7eb";
const BEFORE: &str = "#c7cdd6";
const PREFILL: &str = "#2563eb";
const DECODE: &str = "#ea7a1a";

/// A chart of its own height, with fonts that every viewer has.
pub fn svg(report: &Report) -> String {
    let several_threads = report.rows.iter().any(|row| row.threads != report.rows[0].threads);
    let label = |row: &Row| match several_threads {
        true => format!("{}, {} thr.", row.test, row.threads),
        false => row.test.clone(),
    };
    let longest = report.rows.iter().map(|row| label(row).chars().count()).max().unwrap_or(0);
    let left = MARGIN + CHARACTER * longest as f64 + 12.0;

    let mut y = MARGIN + 14.0;
    let mut body = String::new();
    text(&mut body, MARGIN, y, 17, INK, "start", &format!("bitnet bench: {}", report.model.name));
    for line in &report.machine.lines() {
        y += 19.0;
        text(&mut body, MARGIN, y, 12, PALE, "start", line);
    }
    if let Some(compared) = &report.compared_with {
        y += 24.0;
        rectangle(&mut body, MARGIN, y - 10.0, 14.0, 10.0, BEFORE);
        text(&mut body, MARGIN + 21.0, y, 12, PALE, "start", &compared.sentence());
    }
    for (kind, name, colour) in
        [(Kind::Prefill, "Prefill", PREFILL), (Kind::Decode, "Decode", DECODE)]
    {
        let rows: Vec<&Row> = report.rows.iter().filter(|row| row.of.kind == kind).collect();
        if rows.is_empty() {
            continue;
        }
        y += 42.0;
        text(&mut body, MARGIN, y, 14, INK, "start", &format!("{name}, tokens per second"));
        y += 12.0;
        let fastest = rows
            .iter()
            .map(|row| row.tokens_per_s.max.max(row.before_tokens_per_s.unwrap_or(0.0)))
            .fold(0.0, f64::max);
        let step = tick(fastest);
        let scale = (WIDTH - MARGIN - FIGURE - left) / fastest;
        let height = ROW * rows.len() as f64;
        for i in 0..=(fastest / step) as usize {
            let x = left + scale * step * i as f64;
            line(&mut body, (x, y), (x, y + height), GRID);
            let figure = plain(step * i as f64);
            text(&mut body, x, y + height + 16.0, 11, PALE, "middle", &figure);
        }
        for (i, row) in rows.iter().enumerate() {
            let middle = y + ROW * (i as f64 + 0.5);
            let speed = &row.tokens_per_s;
            text(&mut body, left - 10.0, middle + 4.5, 13, INK, "end", &label(row));
            // The bar of an earlier run looks out from behind this one's.
            if let Some(before) = row.before_tokens_per_s {
                rectangle(&mut body, left, middle - BAR / 2.0 - 5.0, scale * before, BAR, BEFORE);
            }
            rectangle(&mut body, left, middle - BAR / 2.0, scale * speed.median, BAR, colour);
            let (least, most) = (left + scale * speed.min, left + scale * speed.max);
            line(&mut body, (least, middle), (most, middle), INK);
            for x in [least, most] {
                line(&mut body, (x, middle - 4.0), (x, middle + 4.0), INK);
            }
            let end = left + scale * speed.max.max(row.before_tokens_per_s.unwrap_or(0.0));
            text(&mut body, end + 8.0, middle + 4.5, 13, INK, "start", &number(speed.median));
        }
        y += height + 20.0;
    }
    y += 24.0;
    let caption = "Bars are medians, thin lines reach from the slowest to the fastest repetition.";
    text(&mut body, MARGIN, y, 11, PALE, "start", caption);
    let height = y + MARGIN - 8.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{body}</svg>\n"
    )
}

/// A round distance between marks that gives three to eight of them.
fn tick(most: f64) -> f64 {
    let decade = 10f64.powf(most.log10().floor());
    let steps = [0.2, 0.5, 1.0, 2.0].map(|step| step * decade);
    steps.into_iter().find(|step| most / step <= 7.0).unwrap_or(2.0 * decade)
}

/// A mark's figure: no more digits than it has.
fn plain(value: f64) -> String {
    let rounded = (1e6 * value).round() / 1e6;
    format!("{rounded}")
}

fn text(svg: &mut String, x: f64, y: f64, size: u32, fill: &str, anchor: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    // Control characters are not XML.
    let text: String = text.chars().filter(|character| !character.is_control()).collect();
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" fill=\"{fill}\" \
         text-anchor=\"{anchor}\">{text}</text>"
    );
}

fn rectangle(svg: &mut String, x: f64, y: f64, width: f64, height: f64, fill: &str) {
    let _ = writeln!(
        svg,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" rx=\"2\" \
         fill=\"{fill}\"/>"
    );
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), stroke: &str) {
    let _ = writeln!(
        svg,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{stroke}\"/>",
        from.0, from.1, to.0, to.1
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_round_and_few() {
        for most in [0.03, 0.9, 1.0, 4.2, 13.0, 99.0, 512.0, 8640.0, 1e6] {
            let marks = (most / tick(most)) as usize;
            assert!((3..=7).contains(&marks), "{most}: {marks}");
        }
        assert_eq!((tick(512.0), plain(3.0 * tick(0.9))), (100.0, "0.6".to_owned()));
    }
}
