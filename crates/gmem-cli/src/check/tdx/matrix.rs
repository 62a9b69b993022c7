//! Entry state × command × operation state.

use super::{Case, large_page, recorded_td, small_page, td_exit};
use gmem_core::vendor::tdx::sept::SeptState;
use gmem_core::vendor::tdx::status::TdxStatus;
use gmem_core::vendor::tdx::tables::OpState;
use gmem_core::vendor::tdx::{Accepted, Answer, PageInfo, Tdx};
use serde_json::Value;

/// The page that the recordings map at 4 KiB before the command.
const MAPPED_PAGE: u64 = small_page(10);

pub(super) fn replay(file: &Value) -> Option<Vec<Case>> {
    let rows = file.get("rows")?.as_array()?;
    rows.iter().find(|row| row.get("op_state").is_some() && row.get("state_before").is_some())?;
    let encodings = file.get("public_state_encoding").and_then(Value::as_object).into_iter().flatten();
    Some(encodings.map(|(name, code)| encoding(name, code)).chain(rows.iter().map(case)).collect())
}

fn encoding(name: &str, code: &Value) -> Case {
    let state = SeptState::ALL.iter().find(|state| state.facts().name == name);
    let got = state.map_or("no such state".to_owned(), |state| format!("{:#x}", state.facts().public));
    Case::compare(format!("public state {name}"), code.as_str().unwrap_or_default(), got)
}

fn case(row: &Value) -> Case {
    let text = |key: &str| row[key].as_str().unwrap_or_default();
    let name = format!("{} {} {} {}", text("op_state"), text("level"), text("state_before"), text("command"));
    let got = run(row).unwrap_or_else(|| "not expressible".to_owned());
    Case::compare(name, expected(row), got)
}

fn expected(row: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let result = &row["result"];
    let result = match result.get("detail") {
        Some(detail) => format!("{} {}", text(&result["status"]), text(detail)),
        None => ["status", "name", "rcx", "rdx"].map(|key| text(&result[key])).join(" "),
    };
    let (state, septe) = (text(&row["state_after"]), text(&row["septe_after"]));
    format!("{result}, then {state} {septe}, children {}", row["chldcnt_delta"])
}

fn run(row: &Value) -> Option<String> {
    let text = |key: &str| row[key].as_str();
    let level = match text("level")? {
        "4K" => 0,
        "2M" => 1,
        "1G" => 2,
        _ => return None,
    };
    let mut td = prepare(text("op_state")?, level, text("state_before")?)?;
    let children = td.child_pages();
    let result = command(&mut td, text("command")?, level, shown_page(row))?;
    let delta = td.child_pages().cast_signed().wrapping_sub(children.cast_signed());
    let (state, septe) = state_after(&td, level);
    Some(format!("{result}, then {state} {septe}, children {delta}"))
}

/// The rows do not name the operand page of PAGE.ADD, PAGE.AUG and PAGE.RELOCATE; where it was used, the entry shows it.
fn shown_page(row: &Value) -> Option<u64> {
    let septe = u64::from_str_radix(row["septe_after"].as_str()?.strip_prefix("0x")?, 16).ok()?;
    Some(septe & 0x000f_ffff_ffff_f000).filter(|hpa| *hpa != 0)
}

fn state_after(td: &Tdx, level: u8) -> (String, String) {
    let read = td.sept_read(PageInfo::new(0, level));
    if read.status != TdxStatus::SUCCESS {
        return (read.status.name().unwrap_or_default().to_owned(), "-".to_owned());
    }
    let state = SeptState::ALL.iter().find(|state| u64::from(state.facts().public) == read.rdx >> 8);
    (state.map_or("?", |state| state.facts().name).to_owned(), format!("{:#x}", read.rcx))
}

/// Brings a TD into the state before the command by the commands that lead there.
fn prepare(op_state: &str, level: u8, state_before: &str) -> Option<Tdx> {
    let mut td = recorded_td();
    let (_, op_state) = OpState::ALL.iter().find(|(name, _)| *name == op_state)?;
    td.set_op_state(*op_state);
    let (state, tracked) = match state_before.strip_suffix(" tracked") {
        Some(state) => (state, true),
        None => (state_before.strip_suffix(" untracked").unwrap_or(state_before), false),
    };
    let (state, children) = match state.split_once('(') {
        Some((state, children)) => (state, children.strip_suffix(')')?),
        None => (state, ""),
    };
    let with_table = state.starts_with("NL_");
    let lowest = if state == "NO_PARENT" {
        level + 2
    } else if with_table {
        level.max(1)
    } else {
        level + 1
    };
    for (table, n) in (lowest..=3).rev().zip(1..) {
        ok(td.sept_add(PageInfo::new(0, table), small_page(n), 0))?;
    }
    if with_table {
        add_children(&mut td, children)?;
    } else {
        add_leaf(&mut td, level, state)?;
    }
    if state.ends_with("BLOCKED") {
        ok(td.range_block(PageInfo::new(0, level)))?;
    }
    if tracked {
        ok(td.track())?;
        ok(td.track())?;
    }
    Some(td)
}

fn add_leaf(td: &mut Tdx, level: u8, state: &str) -> Option<()> {
    let page = if level == 0 { MAPPED_PAGE } else { large_page(0) };
    match state.strip_suffix("_BLOCKED").unwrap_or(state) {
        "FREE" | "NO_PARENT" => Some(()),
        "PENDING" => ok(td.page_aug(PageInfo::new(0, level), page)),
        "MAPPED" | "BLOCKED" => add_mapped(td, PageInfo::new(0, level), page),
        _ => None,
    }
}

fn add_children(td: &mut Tdx, children: &str) -> Option<()> {
    match children {
        "" | "empty" => Some(()),
        "one child PENDING" | "child pending" => ok(td.page_aug(PageInfo::new(0, 0), MAPPED_PAGE)),
        "one child MAPPED" | "child mapped" => add_mapped(td, PageInfo::new(0, 0), MAPPED_PAGE),
        "512 children MAPPED contiguous" => (0..512)
            .map(|n| (n << 12, large_page(0) + (n << 12)))
            .try_for_each(|(gpa, page)| add_mapped(td, PageInfo::new(gpa, 0), page)),
        "512 children PENDING contiguous" => (0..512)
            .map(|n| (n << 12, large_page(0) + (n << 12)))
            .try_for_each(|(gpa, page)| ok(td.page_aug(PageInfo::new(gpa, 0), page))),
        _ => None,
    }
}

/// A page that the guest can use: added while the TD is being built, else augmented and accepted.
fn add_mapped(td: &mut Tdx, at: PageInfo, page: u64) -> Option<()> {
    let added = td.page_add(at, page, small_page(0));
    if added.status == TdxStatus::SUCCESS {
        return Some(());
    }
    ok(td.page_aug(at, page))?;
    (td.page_accept(at) == Accepted::Returned(TdxStatus::SUCCESS)).then_some(())
}

fn ok(answer: Answer) -> Option<()> {
    (answer.status == TdxStatus::SUCCESS).then_some(())
}

fn command(td: &mut Tdx, name: &str, level: u8, shown: Option<u64>) -> Option<String> {
    let at = PageInfo::new(0, level);
    let page = |default: u64| shown.unwrap_or(default);
    let answer = match name {
        "SEPT.ADD(v0)" => td.sept_add(at, small_page(20), 0),
        "SEPT.ADD(v1)" => td.sept_add(at, small_page(20), 1),
        "SEPT.RD" => td.sept_read(at),
        "SEPT.REMOVE" => td.sept_remove(at, 0),
        // ADD and RELOCATE know one level, whatever that of the entry.
        "PAGE.ADD" => td.page_add(PageInfo::new(0, 0), page(small_page(21)), small_page(0)),
        "PAGE.AUG" => td.page_aug(at, page(if level == 0 { small_page(22) } else { large_page(5) })),
        "PAGE.REMOVE" => td.page_remove(at),
        "PAGE.PROMOTE" => td.page_promote(at, 0),
        "PAGE.DEMOTE" => td.page_demote(at, small_page(23)),
        "PAGE.RELOCATE" => relocate(td, shown),
        "RANGE.BLOCK" => td.range_block(at),
        "RANGE.UNBLOCK" => td.range_unblock(at),
        "TRACK" => td.track(),
        "MR.EXTEND" => td.mr_extend(0, &[0; 256]),
        "ACCEPT" => return accept(td, level),
        "ACCEPT(4K)" => return accept(td, 0),
        "ACCEPT(2M)" => return accept(td, 1),
        _ => return None,
    };
    Some(result(answer))
}

/// The page that the entry shows is the target only if the page moved.
fn relocate(td: &mut Tdx, shown: Option<u64>) -> Answer {
    let target = shown.filter(|page| *page != MAPPED_PAGE && *page != large_page(0)).unwrap_or(small_page(24));
    td.page_relocate(PageInfo::new(0, 0), target)
}

fn accept(td: &mut Tdx, level: u8) -> Option<String> {
    match td.page_accept(PageInfo::new(0, level)) {
        Accepted::Returned(status) => Some(result(Answer { status, ..Answer::default() })),
        Accepted::Interrupted => None,
        exit @ Accepted::TdExit(_) => td_exit(exit).map(|detail| format!("TD_EXIT {detail}")),
    }
}

fn result(answer: Answer) -> String {
    let name = answer.status.name().unwrap_or("?");
    format!("{:#018x} {name} {:#x} {:#x}", answer.status.0, answer.rcx, answer.rdx)
}
