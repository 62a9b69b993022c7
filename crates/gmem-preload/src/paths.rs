//! Paths that name a descriptor of the client's own.

use std::ffi::{CStr, c_char, c_int};

use gmem_host::sys::copy_from_client;
use gmem_uapi::Process;

use crate::own::own;
use crate::process;

/// More than the longest path that names a descriptor, with its terminator.
const ROOM: usize = 64;
const PAGE: usize = 4096;

/// The process, if it has any guest_memfd. Most have none, and then nothing else is looked at.
fn with_files() -> Option<&'static Process> {
    match process() {
        Some(process) if process.has_files() => Some(process),
        _ => None,
    }
}

/// Whether a descriptor is a guest_memfd of gmem's.
pub(crate) fn is_file(fd: c_int) -> bool {
    match with_files() {
        Some(process) => own(false, || process.file_size(fd).is_some()),
        None => false,
    }
}

/// The guest_memfd that a path names through /proc or /dev/fd; -1 if none, as also for a path that cannot be read.
pub(crate) fn file_named(path: *const c_char) -> c_int {
    match with_files() {
        Some(_) => own(-1, || with_path(path, descriptor_named).filter(|fd| is_file(*fd)).unwrap_or(-1)),
        None => -1,
    }
}

/// The same for a call that takes a directory and flags: an empty path can stand for the directory's own descriptor.
pub(crate) fn file_named_at(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
    let empty = flags & libc::AT_EMPTY_PATH != 0;
    let follows = flags & libc::AT_SYMLINK_NOFOLLOW == 0;
    let named = |path: &str| match path {
        "" if empty => Some(dir),
        path if follows => descriptor_named(path),
        _ => None,
    };
    let find = || {
        let fd = if empty && path.is_null() { Some(dir) } else { with_path(path, named) };
        fd.filter(|fd| is_file(*fd)).unwrap_or(-1)
    };
    match with_files() {
        Some(_) => own(-1, find),
        None => -1,
    }
}

fn with_path<T>(path: *const c_char, look: impl FnOnce(&str) -> Option<T>) -> Option<T> {
    if path.is_null() {
        return None;
    }
    let mut buffer = [0; ROOM];
    look(read(path.addr(), &mut buffer)?)
}

/// The string at an address that may be bad. What follows the string may lie on a page that is not there.
fn read(address: usize, buffer: &mut [u8; ROOM]) -> Option<&str> {
    let (first, rest) = buffer.split_at_mut(ROOM.min(PAGE - address % PAGE));
    copy_from_client(address, first).ok()?;
    if !first.contains(&0) {
        copy_from_client(address.checked_add(first.len())?, rest).ok()?;
    }
    CStr::from_bytes_until_nul(buffer).ok()?.to_str().ok()
}

/// The number in one of the names that the kernel has for a descriptor.
fn descriptor_named(path: &str) -> Option<c_int> {
    if let Some(name) = path.strip_prefix("/dev/fd/") {
        return number(name);
    }
    let (owner, name) = path.strip_prefix("/proc/")?.split_once("/fd/")?;
    let fd = number(name)?;
    let own = matches!(owner, "self" | "thread-self")
        || number(owner).is_some_and(|owner| owner.cast_unsigned() == std::process::id());
    own.then_some(fd)
}

/// A number as /proc has it: digits without a leading zero.
fn number(name: &str) -> Option<c_int> {
    let plain = name.bytes().all(|byte| byte.is_ascii_digit()) && (name.len() == 1 || !name.starts_with('0'));
    if plain { name.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_descriptors() {
        let own = format!("/proc/{}/fd/7", std::process::id());
        for path in ["/proc/self/fd/7", "/proc/thread-self/fd/7", "/dev/fd/7", &own] {
            assert_eq!(descriptor_named(path), Some(7), "{path}");
        }
        for path in [
            "",
            "/proc/self/fd/",
            "/proc/self/fd/+7",
            "/proc/self/fd/07",
            "/proc/self/fd/7/",
            "/proc/1/fd/7",
            "/dev/fd7",
        ] {
            assert_eq!(descriptor_named(path), None, "{path}");
        }
    }

    #[test]
    fn strings_are_read_with_their_terminator_only() {
        let mut buffer = [0; ROOM];
        assert_eq!(read(c"/dev/fd/7".as_ptr().addr(), &mut buffer), Some("/dev/fd/7"));
        assert_eq!(read(8, &mut buffer), None);
        assert_eq!(read([b'x'; ROOM].as_ptr().addr(), &mut buffer), None, "too long to name a descriptor");
    }
}
