//! What is mapped where in this process, from `/proc/self/maps`.

use std::vec::Vec;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// How a piece of address space is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sharing {
    /// `MAP_SHARED`: another mapping of the same pages can be made.
    Shared,
    /// `MAP_PRIVATE`, anonymous or of a file.
    Private,
    /// The program itself: its stack, its heap, what the dynamic linker loaded. Never guest RAM, whatever a client claims, and
    /// nothing that may become shared with a child of fork.
    Program,
}

/// A piece of address space that is mapped in one way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Area {
    /// First address.
    pub start: usize,
    /// First address after it.
    pub end: usize,
    /// Shared or private.
    pub sharing: Sharing,
    /// `PROT_READ`, `PROT_WRITE` and `PROT_EXEC`, as the kernel numbers them.
    pub prot: u32,
}

impl Area {
    /// Whether a read, or a write, of the area can succeed.
    #[must_use]
    pub fn allows(&self, write: bool) -> bool {
        self.prot & if write { 2 } else { 1 } != 0
    }
}

/// The mapped areas that overlap `[start, end)`, in ascending order, cut to it.
///
/// # Errors
/// Those of opening and reading `/proc/self/maps`.
pub fn areas(start: usize, end: usize) -> Result<Vec<Area>, Errno> {
    let text = read_all("/proc/self/maps")?;
    let lines =
        || text.split(|byte| *byte == b'\n').filter_map(|line| core::str::from_utf8(line).ok()).filter_map(parse);
    let images: Vec<&str> = lines().filter(|(area, _)| area.prot & EXEC != 0).map(|(_, name)| name).collect();
    let cut = lines().map(|(area, name)| {
        let program = name.starts_with('[') && !name.starts_with("[anon") || !name.is_empty() && images.contains(&name);
        let sharing = if program && area.sharing == Sharing::Private { Sharing::Program } else { area.sharing };
        Area { start: area.start.max(start), end: area.end.min(end), sharing, ..area }
    });
    Ok(cut.filter(|area| area.start < area.end).collect())
}

const EXEC: u32 = 4;

/// End of the addresses that a process may name (`TASK_SIZE_MAX`): with five paging levels it lies higher.
#[must_use]
pub fn user_address_end() -> u64 {
    use rustix::mm::{MapFlags, ProtFlags};
    const FOUR_LEVELS: u64 = 1 << 47;
    const FIVE_LEVELS: u64 = 1 << 56;
    const PAGE: u64 = 4096;
    let beyond = core::ptr::without_provenance_mut(usize::try_from(FOUR_LEVELS).unwrap_or(0));
    let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE | MapFlags::NORESERVE;
    // SAFETY: nothing that is mapped is replaced, and the page is given back at once.
    let there = unsafe { rustix::mm::mmap_anonymous(beyond, 4096, ProtFlags::empty(), flags) };
    if let Ok(page) = there {
        // SAFETY: mapped a moment ago; nothing refers to it.
        let _ = unsafe { rustix::mm::munmap(page, 4096) };
    }
    let five = there.is_ok() || there == Err(Errno::EXIST);
    if five { FIVE_LEVELS - PAGE } else { FOUR_LEVELS - PAGE }
}

/// The whole mapped area that holds `address`.
#[must_use]
pub fn area_around(address: usize) -> Option<(usize, usize)> {
    let text = read_all("/proc/self/maps").ok()?;
    let lines = text.split(|byte| *byte == b'\n').filter_map(|line| core::str::from_utf8(line).ok());
    let (area, _) = lines.filter_map(parse).find(|(area, _)| area.start <= address && address < area.end)?;
    Some((area.start, area.end))
}

/// An area and its name, which is a path, a word in brackets, or nothing.
fn parse(line: &str) -> Option<(Area, &str)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let name = fields.nth(3).unwrap_or("");
    let area = Area {
        start: usize::from_str_radix(start, 16).ok()?,
        end: usize::from_str_radix(end, 16).ok()?,
        prot: permissions
            .chars()
            .zip([('r', 1), ('w', 2), ('x', 4)])
            .filter(|(c, (is, _))| c == is)
            .map(|(_, (_, bit))| bit)
            .sum(),
        sharing: if permissions.ends_with('s') { Sharing::Shared } else { Sharing::Private },
    };
    Some((area, name))
}

pub(crate) fn read_all(path: &str) -> Result<Vec<u8>, Errno> {
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut text = Vec::with_capacity(1 << 14);
    loop {
        let mut chunk = [0u8; 4096];
        match rustix::io::read(&file, &mut chunk)? {
            0 => return Ok(text),
            n => text.extend_from_slice(&chunk[..n]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel_are_understood() {
        let (area, name) = parse("7f00-7f10 rw-s 00000000 00:01 1044 /memfd:x (deleted)").unwrap();
        assert_eq!((area.start, area.end, area.sharing, area.prot), (0x7f00, 0x7f10, Sharing::Shared, 3));
        assert_eq!(name, "/memfd:x");
        let (area, name) = parse("7f00-7f10 ---p 0 00:00 0").unwrap();
        assert_eq!((area.sharing, area.prot, name), (Sharing::Private, 0, ""));
        assert_eq!(parse(""), None);
    }

    #[test]
    fn the_program_itself_is_told_from_memory() {
        let sharing = |address: usize| areas(address, address + 1).unwrap().first().map(|area| area.sharing);
        static DATA: [u64; 4] = [1, 2, 3, 4];
        assert_eq!(sharing((&raw const DATA).addr()), Some(Sharing::Program));
        let mapped = vec![0u8; 1 << 24];
        assert_eq!(sharing(mapped.as_ptr().addr()), Some(Sharing::Private));
    }
}
