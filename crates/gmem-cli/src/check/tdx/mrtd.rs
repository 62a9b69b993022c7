//! MRTD values.
//!
//! A vector lists pages, or describes its steps in a note. The notes are prose; those that this file understands name
//! PAGE.ADD and MR.EXTEND with their addresses, or say that the listed pages are measured in another order than KVM's. What
//! their words mean is settled by the digest, which no wrong order reproduces.

use super::Case;
use gmem_core::measure::tdx::Mrtd;
use serde_json::Value;

use crate::measure::report::hex;

const PAGE: usize = 4096;

pub(super) fn replay(file: &Value) -> Option<Vec<Case>> {
    let vectors = file.get("vectors")?.as_array()?;
    vectors.iter().find(|vector| vector.get("mrtd").is_some())?;
    Some(vectors.iter().map(case).collect())
}

fn case(vector: &Value) -> Case {
    let text = |key: &str| vector[key].as_str().unwrap_or_default();
    let digests: Vec<String> = Order::of(vector)
        .into_iter()
        .map(|order| measure(vector, order).map_or("not expressible".to_owned(), |mrtd| hex(&mrtd.digest())))
        .collect();
    let usual = digests.first().map_or("", String::as_str);
    let got = digests.iter().find(|digest| *digest == text("mrtd")).map_or(usual, String::as_str);
    Case::compare(text("name"), text("mrtd"), got)
}

struct Page {
    gpa: u64,
    measured: bool,
    content: Box<[u8; PAGE]>,
}

fn measure(vector: &Value, order: Order) -> Option<Mrtd> {
    let Some(ops) = vector.get("ops") else { return follow_note(vector["ops_note"].as_str()?) };
    let steps = ops.as_array()?.iter().map(step).collect::<Option<Vec<_>>>()?;
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

/// In which order a vector's pages are measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// KVM's, which the files call the default.
    PageByPage,
    Descending,
    AddsFirst,
}

impl Order {
    /// KVM's order, and others that the vector's own words may mean.
    fn of(vector: &Value) -> Vec<Self> {
        let texts = vector.as_object().into_iter().flatten().filter_map(|(_, value)| value.as_str());
        let about = texts.collect::<Vec<_>>().join(" ").to_lowercase().replace(['_', '-'], " ");
        let mentions = |words: &[&str]| words.iter().any(|words| about.contains(words));
        let adds_first = mentions(&["two pass", "first", "all page.add", "then all", "before"]);
        let descending = mentions(&["descending", "reverse"]);
        let others = [(Self::AddsFirst, adds_first), (Self::Descending, descending)];
        let others = others.into_iter().filter(|(_, is_meant)| *is_meant).map(|(order, _)| order);
        std::iter::once(Self::PageByPage).chain(others).collect()
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

/// Carries out a sentence such as `PAGE.ADD 0x1000; one MR.EXTEND at GPA 0x1100 of 256 bytes 0x07`: each leaf is followed by
/// its addresses, and MR.EXTEND by the byte of the contents. `16 MR.EXTEND` takes all chunks of its pages.
fn follow_note(note: &str) -> Option<Mrtd> {
    let words: Vec<&str> = note.split([' ', ',', ';', '(', ')']).filter(|word| !word.is_empty()).collect();
    let is_leaf = |word: &str| word.ends_with("PAGE.ADD") || word.ends_with("MR.EXTEND");
    let starts: Vec<usize> = (0..words.len()).filter(|at| is_leaf(words[*at])).collect();
    let mut mrtd = Mrtd::new();
    for (start, end) in starts.iter().zip(starts.iter().skip(1).chain([&words.len()])) {
        let numbers: Vec<u64> = words[*start..*end].iter().filter_map(|word| number(word)).collect();
        let chunks = if words[..*start].last() == Some(&"16") { 16 } else { 1 };
        match numbers.as_slice() {
            gpas @ [_, ..] if words[*start].ends_with("PAGE.ADD") => gpas.iter().for_each(|gpa| mrtd.page_add(*gpa)),
            [gpas @ .., byte] if !gpas.is_empty() => {
                let content = [u8::try_from(*byte).ok()?; 256];
                let all = gpas.iter().flat_map(|gpa| (0..chunks).map(|chunk| gpa.wrapping_add(256 * chunk)));
                all.for_each(|gpa| mrtd.extend(gpa, &content));
            }
            _ => return None,
        }
    }
    (!starts.is_empty()).then_some(mrtd)
}

fn number(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn notes_say_what_is_added_and_extended() {
        let page = |byte| json!({"gpa": "0x1000", "measure": true, "content": byte});
        let ops = measure(&json!({"ops": [page("all 0x07")]}), Order::PageByPage);
        assert_eq!(follow_note("TDH.MEM.PAGE.ADD 0x1000, then 16 MR.EXTEND of 0x1000, all 0x07"), ops);
        let one = follow_note("PAGE.ADD 0x1000; one MR.EXTEND at GPA 0x1100 of 256 bytes 0x07").unwrap();
        let mut expected = Mrtd::new();
        expected.page_add(0x1000);
        expected.extend(0x1100, &[7; 256]);
        assert!(one == expected);
        assert!(follow_note("PAGE.ADD somewhere").is_none() && follow_note("nothing").is_none());
    }

    #[test]
    fn only_an_order_that_the_words_may_mean_is_tried() {
        let page = |gpa| json!({"gpa": gpa, "measure": true, "content": "all 0x01"});
        let vector =
            |name: &str, mrtd: &str| json!({"name": name, "ops": [page("0x1000"), page("0x2000")], "mrtd": mrtd});
        let adds_first = hex(&measure(&vector("", ""), Order::AddsFirst).unwrap().digest());
        let usual = hex(&measure(&vector("", ""), Order::PageByPage).unwrap().digest());
        let passes = |name, mrtd: &str| case(&vector(name, mrtd)).outcome.is_ok();
        assert!(passes("two_pass", &adds_first) && !passes("two_pages", &adds_first));
        assert!(passes("two_pass", &usual) && passes("two_pages", &usual));
    }
}
