//! What is mapped where in this process, from `/proc/self/maps`.

mod query;

use std::sync::OnceLock;
use std::vec::Vec;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::address_space;

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

/// A file, as the kernel tells files apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileId {
    /// Number of the device.
    pub device: u64,
    /// Number of the inode on it.
    pub inode: u64,
}

impl FileId {
    /// That of an open file.
    ///
    /// # Errors
    /// EBADF.
    pub fn of(fd: impl AsFd) -> Result<Self, Errno> {
        let stat = rustix::fs::fstat(fd)?;
        Ok(Self { device: stat.st_dev, inode: stat.st_ino })
    }
}

/// A piece of address space that is mapped in one way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Area {
    /// First address.
    pub start: usize,
    /// First address after it.
    pub end: usize,
    /// Shared or private.
    pub sharing: Sharing,
    /// `PROT_READ`, `PROT_WRITE` and `PROT_EXEC`, as the kernel numbers them.
    pub prot: u32,
    /// What is mapped, unless it is anonymous memory.
    pub file: Option<FileId>,
    /// Where in the file `start` lies.
    pub offset: u64,
}

impl Area {
    /// The part within `[start, end)`, if there is one.
    #[must_use]
    pub fn part(&self, start: usize, end: usize) -> Option<Self> {
        let part = Self { start: self.start.max(start), end: self.end.min(end), ..*self };
        (part.start < part.end).then(|| Self { offset: self.offset_of(part.start), ..part })
    }

    /// Where in the file an address of the area lies.
    #[must_use]
    pub fn offset_of(&self, address: usize) -> u64 {
        self.offset.wrapping_add((address - self.start) as u64)
    }

    /// Whether a read, or a write, of the area can succeed.
    #[must_use]
    pub fn allows(&self, write: bool) -> bool {
        self.prot & if write { 2 } else { 1 } != 0
    }
}

/// The areas of this process, as they are when they are asked for first.
///
/// A kernel that can be asked about a range is asked. Otherwise, and where the program may be in the range, all of them are read
/// and kept.
#[derive(Debug)]
pub struct Maps {
    file: OwnedFd,
    read: OnceLock<Vec<Mapped>>,
}

#[derive(Clone, Debug)]
struct Mapped {
    area: Area,
    /// The program itself, as far as can be told without a name.
    may_be_program: bool,
}

impl Maps {
    /// Those of now.
    ///
    /// # Errors
    /// Those of opening `/proc/self/maps`.
    pub fn now() -> Result<Self, Errno> {
        Ok(Self { file: open("/proc/self/maps")?, read: OnceLock::new() })
    }

    /// The areas that overlap `[start, end)`, in ascending order, cut to it.
    ///
    /// A part of the program that has no name may be one mapping with ordinary memory, so it counts as the program only where
    /// the range has named parts in it, too, and cannot be meant as guest RAM.
    ///
    /// # Errors
    /// Those of reading `/proc/self/maps`.
    pub fn areas(&self, start: usize, end: usize) -> Result<Vec<Area>, Errno> {
        let own = address_space::page().unwrap_or(0);
        if self.read.get().is_none()
            && !(start..end).contains(&own)
            && let Some(areas) = query::areas(&self.file, start, end)
        {
            return Ok(areas);
        }
        let all = self.all()?;
        let first = all.partition_point(|mapped| mapped.area.end <= start);
        let within = || all.iter().skip(first).take_while(|mapped| mapped.area.start < end);
        let has_program = within().any(|mapped| mapped.area.sharing == Sharing::Program);
        let all = within().map(|Mapped { area, may_be_program }| Area {
            sharing: if has_program && *may_be_program { Sharing::Program } else { area.sharing },
            ..*area
        });
        Ok(all.filter_map(|area| area.part(start, end)).collect())
    }

    /// Where the mapping that holds `address` starts and ends, whatever part of it is asked for.
    ///
    /// # Errors
    /// Those of reading `/proc/self/maps`.
    pub fn around(&self, address: usize) -> Result<Option<(usize, usize)>, Errno> {
        let holds = |area: &Area| area.start <= address && address < area.end;
        let asked = if self.read.get().is_none() { query::area(&self.file, address) } else { None };
        let area = match asked {
            Some(area) => Some(area).filter(holds),
            None => self.all()?.iter().map(|mapped| mapped.area).find(holds),
        };
        Ok(area.map(|area| (area.start, area.end)))
    }

    fn all(&self) -> Result<&[Mapped], Errno> {
        if self.read.get().is_none() {
            let text = read_to_end(&self.file)?;
            let mut named: Vec<(Area, &str)> = lines(&text).collect();
            find_program(&mut named);
            let nameless = nameless_program(&named);
            let all = named.into_iter().zip(nameless);
            let _ = self.read.set(all.map(|((area, _), may_be_program)| Mapped { area, may_be_program }).collect());
        }
        Ok(self.read.get().map_or(&[], Vec::as_slice))
    }
}

/// The areas of now that overlap `[start, end)`.
///
/// # Errors
/// Those of opening and reading `/proc/self/maps`.
pub fn areas(start: usize, end: usize) -> Result<Vec<Area>, Errno> {
    Maps::now()?.areas(start, end)
}

/// The areas that their names tell to be the program: the kernel's words for stack, heap and vDSO, and loaded images. And the
/// page by which gmem knows its process.
fn find_program(all: &mut [(Area, &str)]) {
    let images: Vec<&str> = all.iter().filter(|(area, _)| area.prot & EXEC != 0).map(|(_, name)| *name).collect();
    let own = address_space::page().unwrap_or(0);
    for (area, name) in all {
        let named = area.start == own
            || name.starts_with('[') && !name.starts_with("[anon")
            || !name.is_empty() && images.contains(name);
        if named && area.sharing == Sharing::Private {
            area.sharing = Sharing::Program;
        }
    }
}

/// Which areas are the program although no name says so: zeroed data right behind an image, and what this thread runs on.
fn nameless_program(all: &[(Area, &str)]) -> Vec<bool> {
    thread_local!(static OF_THIS_THREAD: u8 = const { 0 });
    let on_stack = 0u8;
    let local = OF_THIS_THREAD.try_with(|byte| (&raw const *byte).addr()).unwrap_or(0);
    let used = [(&raw const on_stack).addr(), local];
    let mut program_end = 0;
    let of_program = |(area, name): &(Area, &str)| {
        let own = area.start == program_end || used.iter().any(|address| (area.start..area.end).contains(address));
        let found = area.sharing == Sharing::Private && name.is_empty() && own;
        if found || area.sharing == Sharing::Program {
            program_end = area.end;
        }
        found
    };
    all.iter().map(of_program).collect()
}

fn lines(text: &[u8]) -> impl Iterator<Item = (Area, &str)> {
    text.split(|byte| *byte == b'\n').filter_map(|line| core::str::from_utf8(line).ok()).filter_map(parse)
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

/// What the kernel keeps about a mapping beside its protection, as `VmFlags` of `/proc/self/smaps` has it.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct VmFlags(String);

impl VmFlags {
    /// Whether a flag is set, by its two letters.
    #[must_use]
    pub fn has(&self, flag: &str) -> bool {
        self.0.split_ascii_whitespace().any(|set| set == flag)
    }

    /// Whether the mapping is registered with a userfaultfd, in any mode.
    #[must_use]
    pub fn has_userfaultfd(&self) -> bool {
        ["um", "uw", "ui"].into_iter().any(|flag| self.has(flag))
    }

    /// Those of the mapping at `address`. The file is read no further than it has to be: the kernel walks the pages of every
    /// mapping that it writes about.
    ///
    /// # Errors
    /// Those of opening and reading the file; ENOENT if nothing is mapped there.
    pub fn at(address: usize) -> Result<Self, Errno> {
        let file = open("/proc/self/smaps")?;
        let (mut text, mut inside) = (Vec::new(), false);
        loop {
            let n = read_more(&file, &mut text)?;
            let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            if let Some(flags) = flags_in(&text[..whole], address, &mut inside) {
                return Ok(flags);
            }
            text.drain(..whole);
            if n == 0 {
                return Err(Errno::NOENT);
            }
        }
    }
}

/// The flags of the mapping at `address`, if they are in these lines. `inside` says whether the lines before told of it.
fn flags_in(text: &[u8], address: usize, inside: &mut bool) -> Option<VmFlags> {
    let lines = text.split(|byte| *byte == b'\n').filter_map(|line| core::str::from_utf8(line).ok());
    for line in lines {
        if let Some((area, _)) = parse(line) {
            *inside = area.start <= address && address < area.end;
        } else if let (true, Some(flags)) = (*inside, line.strip_prefix("VmFlags:")) {
            return Some(VmFlags(flags.to_owned()));
        }
    }
    None
}

/// An area and its name, which is a path, a word in brackets, or nothing.
fn parse(line: &str) -> Option<(Area, &str)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let (major, minor) = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let inode: u64 = fields.next()?.parse().ok()?;
    let name = fields.next().unwrap_or("");
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
        file: (inode != 0).then(|| FileId { device: rustix::fs::makedev(major, minor), inode }),
        offset,
    };
    Some((area, name))
}

fn open(path: &str) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

fn read_to_end(file: &OwnedFd) -> Result<Vec<u8>, Errno> {
    let mut text = Vec::with_capacity(1 << 14);
    while read_more(file, &mut text)? > 0 {}
    Ok(text)
}

/// Appends what comes next, up to a page; returns how much that is. Not by way of the stack: the thread is a client's.
fn read_more(file: impl AsFd, text: &mut Vec<u8>) -> Result<usize, Errno> {
    let before = text.len();
    text.resize(before + 4096, 0);
    let read = rustix::io::read(file, &mut text[before..]);
    text.truncate(before + read.unwrap_or(0));
    read
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel_are_understood() {
        let (area, name) = parse("7f00-7f10 rw-s 00002000 08:01 1044 /memfd:x (deleted)").unwrap();
        assert_eq!((area.start, area.end, area.sharing, area.prot), (0x7f00, 0x7f10, Sharing::Shared, 3));
        assert_eq!(name, "/memfd:x");
        let file = FileId { device: rustix::fs::makedev(8, 1), inode: 1044 };
        assert_eq!((area.file, area.offset, area.part(0x7f08, 0x8000).unwrap().offset), (Some(file), 0x2000, 0x2008));
        let (area, name) = parse("7f00-7f10 ---p 0 00:00 0").unwrap();
        assert_eq!((area.sharing, area.prot, area.file, name), (Sharing::Private, 0, None, ""));
        assert_eq!(parse(""), None);
    }

    #[test]
    fn a_range_with_the_program_in_it_spares_what_this_thread_runs_on() {
        let all = areas(0, usize::MAX).unwrap();
        let sharing =
            |address: usize| all.iter().find(|area| (area.start..area.end).contains(&address)).unwrap().sharing;
        thread_local!(static LOCAL: u8 = const { 1 });
        let on_stack = 0u8;
        assert_eq!(sharing((&raw const on_stack).addr()), Sharing::Program);
        LOCAL.with(|local| assert_eq!(sharing((&raw const *local).addr()), Sharing::Program));
    }

    #[test]
    fn what_the_kernel_answers_about_a_range_is_what_it_writes_about_all() {
        let mapped = vec![0u8; 1 << 24];
        let maps = Maps::now().unwrap();
        if !query::is_known(&maps.file) {
            println!("skipped: this kernel has no PROCMAP_QUERY (Linux 6.11)");
            return;
        }
        let address = mapped.as_ptr().addr();
        let ranges = [(address, address + 1), (address + 5000, address + 9000), (address, address + (1 << 24))];
        let asked = ranges.map(|(start, end)| query::areas(&maps.file, start, end).unwrap());
        maps.all().unwrap();
        assert_eq!(asked, ranges.map(|(start, end)| maps.areas(start, end).unwrap()));
        assert!(asked.iter().all(|areas| areas[0].sharing == Sharing::Private && areas[0].file.is_none()));
        // What may be the program it does not judge.
        static DATA: [u64; 4] = [1, 2, 3, 4];
        let address = (&raw const DATA).addr();
        assert_eq!(query::areas(&maps.file, address, address + 1), None);
        assert_eq!(query::areas(&maps.file, 0, 1), Some(Vec::new()));
    }

    #[test]
    fn flags_are_those_of_the_mapping_that_was_asked_for() {
        let text = b"7000-8000 rw-p 0 00:00 0\nVmFlags: rd lo \n9000-a000 ---p 0 00:00 0\nSize: 4 kB\nVmFlags: wr dd\n";
        let at = |address| flags_in(text, address, &mut false);
        assert!(at(0x7fff).is_some_and(|flags| flags.has("lo") && !flags.has("dd")));
        assert!(at(0x9000).is_some_and(|flags| flags.has("dd") && !flags.has("lo")));
        assert_eq!(at(0x8000), None);
        let on_stack = 0u8;
        assert!(VmFlags::at((&raw const on_stack).addr()).unwrap().has("wr"));
        assert_eq!(VmFlags::at(0), Err(Errno::NOENT));
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
