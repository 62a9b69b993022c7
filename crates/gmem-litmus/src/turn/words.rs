//! What happens, in words.

use gmem_core::addr::{GfnRange, PageIndex, Pfn};
use gmem_core::file::FileId;
use gmem_core::invalidate::Filter;
use gmem_core::ops::{Action, DirectMap, Lock, Pages, Parts, Reach};
use gmem_core::vendor::Side;

use crate::machine::user_page;
use crate::program::Program;

pub(super) fn word(side: Side) -> &'static str {
    match side {
        Side::Shared => "shared",
        Side::Private => "private",
    }
}

/// What a step that asks for nothing is about.
pub(super) fn quiet(reach: Reach) -> &'static str {
    match (reach.reads, reach.writes) {
        (reads, writes) if reads == Parts::INVALIDATION && writes.is_empty() => "notes the sequence",
        (reads, writes) if reads.contains(Parts::ATTRIBUTES) && writes.is_empty() => {
            "looks at attribute, slot and file"
        }
        (_, writes) if writes == Parts::ARCH => "prepares the page",
        (_, writes) if writes == Parts::FILES => "looks at the page",
        (_, writes) if writes.contains(Parts::SLOTS) => "changes the slots",
        _ => "goes on",
    }
}

/// A frame by what it is: a page of a file, or of the VMM's own memory.
pub(super) fn frame(program: &Program, pfn: Pfn) -> String {
    let of_file = program.files.iter().zip(0u32..).find_map(|(file, id)| {
        let index = pfn.0.checked_sub(FileId(id).pfn(PageIndex(0)).0)?;
        (index < file.pages).then(|| format!("page {index} of {}", file.name))
    });
    of_file
        .or_else(|| user_page(pfn).map(|page| format!("page {page} of the VMM")))
        .unwrap_or_else(|| format!("{pfn:?}"))
}

fn file_name(program: &Program, file: FileId) -> &str {
    program.files.get(file.0 as usize).map_or("a file", |file| file.name.as_str())
}

pub(super) fn describe(program: &Program, action: &Action) -> String {
    let pages = |pages: &Pages| {
        format!("{} {}..{}", file_name(program, pages.file), pages.range.start().0, pages.range.end().0)
    };
    let lock = |lock: &Lock| match lock {
        Lock::Slots => "slots_lock".to_owned(),
        Lock::FileExclusive(id) => format!("the invalidate lock of {} (exclusive)", file_name(program, *id)),
        Lock::FileShared(id) => format!("the invalidate lock of {} (shared)", file_name(program, *id)),
        Lock::Folios(which) => format!("the folio lock of {}", pages(which)),
    };
    let gfns = |range: &GfnRange| format!("gfn {}..{}", range.start().0, range.end().0);
    match action {
        Action::Continue => "goes on".into(),
        Action::Lock(which) => format!("takes {}", lock(which)),
        Action::Unlock(which) => format!("releases {}", lock(which)),
        Action::Zap { range, filter } => match filter {
            Filter::Both => format!("zaps {}", gfns(range)),
            Filter::Only(side) => format!("zaps {} ({} only)", gfns(range), word(*side)),
        },
        Action::Flush => "flushes TLBs".into(),
        Action::Synchronize => "waits for faults that read the old slots".into(),
        Action::Zero(which) => format!("zeroes {}", pages(which)),
        Action::CopyIn(which) => format!("copies into {}", pages(which)),
        Action::Free(which) => format!("frees {}", pages(which)),
        Action::DirectMap(which, DirectMap::Remove) => format!("hides {} from the host", pages(which)),
        Action::DirectMap(which, DirectMap::Restore) => format!("shows {} to the host", pages(which)),
        Action::FlushDirectMap => "flushes the host's TLBs".into(),
        Action::DropUserMappings(which) => format!("unmaps {} from the VMM", pages(which)),
        Action::MapUser(which) => format!("maps {} for the VMM", pages(which)),
        Action::GetUserPage { gfn, .. } => format!("looks up the VMM's page of gfn {}", gfn.0),
        Action::ChangeUserMapping => "changes the VMM's memory".into(),
        Action::UseDirectMap(which) => format!("uses {} through the direct map", pages(which)),
        Action::Map(mapping) => {
            let size = mapping.level.pages();
            format!(
                "maps gfn {} ({} page{}, {})",
                mapping.gfn.0,
                size,
                if size == 1 { "" } else { "s" },
                word(mapping.side)
            )
        }
        Action::Refill(range) => format!("{} may be mapped again", gfns(range)),
    }
}
