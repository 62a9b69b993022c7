//! MRTD values.
//!
//! A vector lists pages, or describes its steps in a note. The notes are prose; those that this file understands name
//! PAGE.ADD and MR.EXTEND with their addresses, or say that the listed pages are measured in another order than KVM's.

use super::Case;
use gmem_core::measure::tdx::Mrtd;
use serde_json::Value;

const PAGE: usize = 4096;

pub(super) fn replay(file: &Value) -> Option<Vec<Case>> {
    let vectors = file.get("vectors")?.as_array()?;
    vectors.iter().map(|vector| vector.get("mrtd")).collect::<Option<Vec<_>>>()?;
    Some(vectors.iter().map(case).collect())
}

fn case(vector: &Value) -> Case {
    let text = |key: &str| vector[key].as_str().unwrap_or_default();
    let got = measure(vector).map_or("not expressible".to_owned(), |mrtd| hex(&mrtd.digest()));
    Case::compare(text("name"), text("mrtd"), got)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

struct Page {
    gpa: u64,
    measured: bool,
    content: Box<[u8; PAGE]>,
}

fn measure(vector: &Value) -> Option<Mrtd> {
    let Some(ops) = vector.get("ops") else { return follow_note(vector["ops_note"].as_str()?) };
    let steps = ops.as_array()?.iter().map(step).collect::<Option<Vec<_>>>()?;
    let order = Order::of(vector);
    let mut mrtd = Mrtd::new();
    for step in &steps {
        match step {
            Step::Page(page) => {
                mrtd.page_add(page.gpa);
                if order != Order::AddsFirst {
                    extend(&mut mrtd, page, order);
                }
            }
            Step::Extend { gpa, byte } => mrtd.extend(*gpa, &[*byte; 256]),
        }
    }
    for step in &steps {
        match step {
            Step::Page(page) if order == Order::AddsFirst => extend(&mut mrtd, page, order),
            _ => {}
        }
    }
    Some(mrtd)
}

/// In which order a vector's pages are measured: its own words say so where it is not KVM's order.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    PageByPage,
    Descending,
    AddsFirst,
}

impl Order {
    fn of(vector: &Value) -> Self {
        let texts = vector.as_object().into_iter().flatten().filter_map(|(_, value)| value.as_str());
        let about = texts.collect::<Vec<_>>().join(" ").to_lowercase().replace(['_', '-'], " ");
        if ["two pass", "adds first", "all page.add"].iter().any(|words| about.contains(words)) {
            Self::AddsFirst
        } else if about.contains("descending") || about.contains("reverse") {
            Self::Descending
        } else {
            Self::PageByPage
        }
    }
}

enum Step {
    Page(Page),
    Extend { gpa: u64, byte: u8 },
}

/// A page that is added and perhaps measured, or, where the step names its leaf, one of the two.
fn step(op: &Value) -> Option<Step> {
    let leaf = op.get("op").and_then(Value::as_str).unwrap_or_default().to_uppercase();
    if leaf.contains("EXTEND") {
        let byte = op.get("content")?.as_str()?.strip_prefix("all ").and_then(number)?;
        return Some(Step::Extend { gpa: number(op.get("gpa")?.as_str()?)?, byte: u8::try_from(byte).ok()? });
    }
    let content = op.get("content").and_then(Value::as_str).map_or(Some([0; PAGE]), content)?;
    let measured = if leaf.contains("ADD") { false } else { op.get("measure")?.as_bool()? };
    Some(Step::Page(Page { gpa: number(op.get("gpa")?.as_str()?)?, measured, content: Box::new(content) }))
}

fn extend(mrtd: &mut Mrtd, page: &Page, order: Order) {
    let mut chunks: Vec<_> = (0..).map(|i| page.gpa.wrapping_add(i * 256)).zip(page.content.as_chunks().0).collect();
    if order == Order::Descending {
        chunks.reverse();
    }
    chunks.into_iter().filter(|_| page.measured).for_each(|(gpa, chunk)| mrtd.extend(gpa, chunk));
}

/// `all 0x5a`, or the page itself in hexadecimal digits.
fn content(text: &str) -> Option<[u8; PAGE]> {
    if let Some(byte) = text.strip_prefix("all ") {
        return Some([u8::try_from(number(byte)?).ok()?; PAGE]);
    }
    let mut page = [0; PAGE];
    if text.len() != 2 * PAGE {
        return None;
    }
    for (i, byte) in page.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(page)
}

/// Carries out clauses such as `PAGE.ADD 0x1000; one MR.EXTEND at GPA 0x1100 of 256 bytes 0x07`.
fn follow_note(note: &str) -> Option<Mrtd> {
    let mut mrtd = Mrtd::new();
    for clause in note.replace(" then ", ";").split(';') {
        let numbers: Vec<_> = clause
            .split([' ', ',', '(', ')'])
            .filter(|word| word.starts_with("0x"))
            .map(number)
            .collect::<Option<_>>()?;
        match numbers[..] {
            ref gpas @ [_, ..] if clause.contains("PAGE.ADD") && !clause.contains("MR.EXTEND") => {
                gpas.iter().for_each(|gpa| mrtd.page_add(*gpa));
            }
            [gpa, byte] if clause.contains("MR.EXTEND") => mrtd.extend(gpa, &[u8::try_from(byte).ok()?; 256]),
            _ => return None,
        }
    }
    Some(mrtd)
}

fn number(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}
