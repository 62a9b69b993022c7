//! `PROCMAP_QUERY` (Linux 6.11, `fs/proc/task_mmu.c`): mappings asked for by address, where `/proc/self/maps` would have to be read
//! from its start.

use std::vec::Vec;

use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;

use super::{Area, FileId, Sharing};
use crate::sys;

const PROCMAP_QUERY: u32 = 0xc068_6611;

const READABLE: u64 = 1;
const WRITABLE: u64 = 2;
const EXECUTABLE: u64 = 4;
const SHARED: u64 = 8;
/// In a question: the mapping at the address or the next one.
const COVERING_OR_NEXT: u64 = 0x10;

/// `struct procmap_query`.
#[derive(Debug, Default)]
#[repr(C)]
struct Query {
    size: u64,
    flags: u64,
    address: u64,
    start: u64,
    end: u64,
    mapped: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    major: u32,
    minor: u32,
    name_size: u32,
    build_id_size: u32,
    name: u64,
    build_id: u64,
}

/// The areas that overlap `[start, end)`, cut to it, where it is certain that none of them is the program. None: `maps` has to be
/// read.
pub(super) fn areas(maps: &OwnedFd, start: usize, end: usize) -> Option<Vec<Area>> {
    let (mut found, mut next) = (Vec::new(), start);
    while next < end {
        let area = match ask(maps, next, &mut []) {
            Ok(area) if area.start < end => area,
            Ok(_) | Err(Errno::NOENT) => break,
            Err(_) => return None,
        };
        if !is_memory(maps, &area) {
            return None;
        }
        found.extend(area.part(start, end));
        next = area.end;
    }
    Some(found)
}

/// The area at `address` or the next one. None: `maps` has to be read.
pub(super) fn area(maps: &OwnedFd, address: usize) -> Option<Area> {
    ask(maps, address, &mut []).ok()
}

/// Shared, or anonymous without a name, which the kernel gives to the program's own.
fn is_memory(maps: &OwnedFd, area: &Area) -> bool {
    let mut name = [0; 8];
    let mut is_nameless = || ask(maps, area.start, &mut name).is_ok() && name[0] == 0;
    area.sharing == Sharing::Shared || area.file.is_none() && is_nameless()
}

/// The mapping at `address` or the next one, and its name, which ends in a zero byte.
fn ask(maps: &OwnedFd, address: usize, name: &mut [u8]) -> Result<Area, Errno> {
    let mut query = Query {
        size: size_of::<Query>() as u64,
        flags: COVERING_OR_NEXT,
        address: address as u64,
        name_size: u32::try_from(name.len()).map_err(|_| Errno::INVAL)?,
        name: if name.is_empty() { 0 } else { name.as_mut_ptr().expose_provenance() as u64 },
        ..Query::default()
    };
    // SAFETY: the request's structure, which says how long it is; the buffer that it names is as long as it says.
    unsafe { sys::ioctl(maps.as_fd(), PROCMAP_QUERY, (&raw mut query).expose_provenance()) }?;
    let prot = [(READABLE, 1), (WRITABLE, 2), (EXECUTABLE, 4)];
    let file = FileId { device: rustix::fs::makedev(query.major, query.minor), inode: query.inode };
    Ok(Area {
        start: usize::try_from(query.start).unwrap_or(usize::MAX),
        end: usize::try_from(query.end).unwrap_or(usize::MAX),
        sharing: if query.mapped & SHARED == 0 { Sharing::Private } else { Sharing::Shared },
        prot: prot.into_iter().filter(|(flag, _)| query.mapped & flag != 0).map(|(_, prot)| prot).sum(),
        file: (query.inode != 0).then_some(file),
        offset: query.offset,
    })
}

/// Whether the kernel can be asked.
#[cfg(test)]
pub(super) fn is_known(maps: &OwnedFd) -> bool {
    ask(maps, 0, &mut []) != Err(Errno::NOTTY)
}
