//! An interleaving as a sequence diagram.

use core::fmt::Write;

use crate::program::Program;
use crate::run::Event;

const LANE: usize = 300;
const ROW: usize = 14;
const TOP: usize = 60;
const LINE_CHARS: usize = 44;

/// Draws one lane per thread, time downwards, one box per step.
#[must_use]
pub fn diagram(program: &Program, title: &str, events: &[Event]) -> String {
    let boxes: Vec<Box> = events.iter().map(|event| Box { lane: event.thread, lines: wrap(&event.what) }).collect();
    let height = TOP + boxes.iter().map(Box::height).sum::<usize>() + ROW;
    let width = LANE * program.threads.len().max(1);
    let mut svg = String::new();
    // Writing to a string cannot fail.
    let _ = draw(&mut svg, program, title, &boxes, (width, height));
    svg
}

struct Box {
    lane: usize,
    lines: Vec<String>,
}

impl Box {
    fn height(&self) -> usize {
        self.lines.len() * ROW + ROW
    }
}

fn draw(
    svg: &mut String,
    program: &Program,
    title: &str,
    boxes: &[Box],
    (width, height): (usize, usize),
) -> core::fmt::Result {
    writeln!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="monospace" font-size="11">"#
    )?;
    writeln!(svg, r#"<rect width="{width}" height="{height}" fill="white"/>"#)?;
    writeln!(svg, r#"<text x="8" y="16" font-weight="bold">{}</text>"#, escape(title))?;
    for (lane, thread) in program.threads.iter().enumerate() {
        let x = lane * LANE + LANE / 2;
        writeln!(
            svg,
            r#"<text x="{x}" y="40" text-anchor="middle" font-weight="bold">{}</text>"#,
            escape(&thread.name)
        )?;
        writeln!(svg, r##"<line x1="{x}" y1="48" x2="{x}" y2="{height}" stroke="#999"/>"##)?;
    }
    let mut y = TOP;
    let mut last: Option<(usize, usize)> = None;
    for one in boxes {
        let x = one.lane * LANE + 8;
        let middle = one.lane * LANE + LANE / 2;
        if let Some((before, bottom)) = last.filter(|(before, _)| *before != middle) {
            writeln!(
                svg,
                r##"<line x1="{before}" y1="{bottom}" x2="{middle}" y2="{y}" stroke="#c33" stroke-dasharray="3 3"/>"##
            )?;
        }
        let (box_width, box_height) = (LANE - 16, one.height() - 6);
        writeln!(
            svg,
            r##"<rect x="{x}" y="{y}" width="{box_width}" height="{box_height}" rx="3" fill="#eef4ff" stroke="#446"/>"##
        )?;
        for (line, text) in one.lines.iter().enumerate() {
            writeln!(svg, r#"<text x="{}" y="{}">{}</text>"#, x + 6, y + ROW * (line + 1), escape(text))?;
        }
        last = Some((middle, y + box_height));
        y += one.height();
    }
    writeln!(svg, "</svg>")
}

fn wrap(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let fits = lines
            .last()
            .is_none_or(|line| line.is_empty() || line.chars().count() + 1 + word.chars().count() <= LINE_CHARS);
        if !fits {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
